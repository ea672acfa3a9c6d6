"""What `ray submit ray_cluster.yaml cluster/launcher.py -- search MODEL ...` uploads and runs, as ~/launcher.py.

Ray joins the arguments with blanks and hands them to a shell, so a value with a blank, a quote or a dollar sign in it
arrives only if it is quoted twice: --out "'my run'". `ray job submit` passes every argument as it is given.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.path.pop(0)  # what lies beside this file must not hide installed packages of the same name
    os.environ.setdefault("RAY_ADDRESS", "auto")
    runpy.run_module("blockpruner", run_name="__main__")
