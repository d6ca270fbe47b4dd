"""`python -m pfode`: the `pfode` command."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder, which `python -m` put there; what lies in it is not ours to import

from pfode.cli.__main__ import main

if __name__ == "__main__":
    main()
