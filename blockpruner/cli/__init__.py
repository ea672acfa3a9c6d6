"""The command line, one command per file. A command takes a config, calls one function and prints its result."""

# isort: off
from blockpruner.cli.environment import check_environment

check_environment()

from blockpruner.cli import (  # noqa: E402, F401 - importing a command adds it, and --help lists them in this order
    demo,
    shrink,
    plan,
    sample,
    times,
    search,
    report,
    prune,
    evaluate,
    latency,
    compensate,
    recover,
    export,
    serve_check,
    compare,
)

# isort: on
from blockpruner.cli.app import app as app  # noqa: E402
from blockpruner.cli.app import main as main  # noqa: E402
