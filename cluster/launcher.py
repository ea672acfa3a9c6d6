"""The script that `ray submit ray_cluster.yaml cluster/launcher.py -- search MODEL ...` uploads and runs.

It is uploaded as ~/launcher.py.

Ray joins the arguments with spaces and passes them to a shell, so a value that contains a space, a quote or a dollar
sign must be quoted twice: --out "'my run'". `ray job submit` passes every argument unchanged.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.path.pop(0)  # files beside this one must not hide installed packages of the same name
    os.environ.setdefault("RAY_ADDRESS", "auto")
    runpy.run_module("blockpruner", run_name="__main__")
