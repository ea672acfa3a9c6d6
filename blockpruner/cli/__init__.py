"""The command line, one command a file: parse, build the config, call one function, print."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

# isort: off
from blockpruner.cli import (  # noqa: F401 - importing a command adds it; --help shows them in this order
    demo,
    plan,
    search,
    report,
    prune,
    evaluate,
    latency,
    recover,
    export,
    serve_check,
    compare,
)

# isort: on
from blockpruner.cli.app import app

WrongUsage: Any = typer.BadParameter.__base__
"""Of all that Typer raises for a wrong command line; it exports only this subclass."""


def main() -> None:
    """The console script. Wrong options, too, are one line and exit code 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; tqdm looks at it when it is imported
    try:
        code = app(standalone_mode=False)
    except WrongUsage as error:
        message = " ".join(error.format_message().split())
        if message:  # empty where the help was printed instead
            print(f"error: {message} (--help shows the options)", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
