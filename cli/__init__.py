if __name__ != "pfode.cli":
    raise ImportError("import pfode.cli: the folder is a part of the package pfode, not a package of its own")
