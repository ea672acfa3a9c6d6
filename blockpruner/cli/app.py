"""The application that all commands belong to, and how each of them runs and ends."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from blockpruner.engine.errors import SearchFailed, UserError

app = typer.Typer(
    help="Find the attention and MLP blocks that a language model can do without, and remove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@contextmanager
def errors_in_one_line(*, resumable: bool = False) -> Iterator[None]:
    """Bad input: one line, exit code 2. A search that cannot go on: one line, 1. Ctrl-C: 130. A bug: its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except SearchFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # the end has begun: a second one must not make it another
            signal.signal(number, signal.SIG_IGN)
        done = "the same command goes on from here" if resumable else "nothing was written"
        print(f"stopped; {done}", file=sys.stderr)
        raise typer.Exit(130) from None


def run_command(function: Callable[..., Any], *args: Any, as_json: bool, resumable: bool = False, **kwargs: Any) -> Any:
    """Call `function(*args, reporter, **kwargs)`; with `as_json` print what it returns as the last line of stdout."""
    from blockpruner.cluster.session import interruptible
    from blockpruner.files import plain
    from blockpruner.showing.console import Reporter, quiet_libraries

    quiet_libraries()
    with errors_in_one_line(resumable=resumable), interruptible():
        result = function(*args, Reporter(Console()), **kwargs)
    if as_json:
        print(json.dumps(plain(result), allow_nan=False))
    return result
