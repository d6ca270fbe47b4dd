if __name__ != "pfode.scores":
    raise ImportError("import pfode.scores: the folder is a part of the package pfode, not a package of its own")
