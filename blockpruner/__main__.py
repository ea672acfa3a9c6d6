"""`python -m blockpruner`."""

import contextlib
import os
import sys

if __name__ == "__main__":
    # Python puts the current folder first on the path, where a torch.py or an engine/ would hide installed packages.
    with contextlib.suppress(FileNotFoundError):  # the current folder was deleted; `cli` says so
        if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.getcwd()):
            sys.path.pop(0)
    from blockpruner.cli import main

    main()
