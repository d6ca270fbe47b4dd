if __name__ != "pfode.samplers":
    raise ImportError("import pfode.samplers: the folder is a part of the package pfode, not a package of its own")
