"""The command line of pfode."""

import sys

if __name__ != "pfode.cli":
    raise ImportError("import pfode.cli: the folder is a part of the package pfode, not a package of its own")

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` put the working folder there; what lies in it is not ours to import
