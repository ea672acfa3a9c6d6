"""The application that contains all commands, and the way each command runs and exits."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from blockpruner.cli.options import as_options, spread
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.files import short
from blockpruner.showing.console import Reporter

SURROUNDINGS = {
    errno.ENAMETOOLONG: "the name is too long for the file system; use a shorter one",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOSPC: "the disk is full; make room, or use another folder",
    errno.EDQUOT: "the quota of the disk is used up; make room, or use another folder",
    errno.EFBIG: "the file would be larger than this system allows",
    errno.EROFS: "the file system can only be read; use another folder",
    errno.ELOOP: "its links lead in a circle",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EIO: "the disk fails to read or write it",
}
"""Errors that a user's disk and names can cause anywhere, in our words."""
app = typer.Typer(
    help="Find the attention and MLP blocks that a language model can do without, and remove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line of stdout.")]


def command(
    example: str,
    *,
    name: str | None = None,
    notes: Sequence[str] = (),
    resumable: Callable[..., bool] | bool = False,
    failed: Callable[[Any], bool] = lambda result: False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a function into a command.

    The first parameter of the function is the `Reporter`. A parameter whose type is an options class becomes one option
    per field. `--json` prints the return value of the function.

    example, notes: shown below the help. resumable: whether the same command resumes after an interruption, or a
    function of the command's own parameters that returns it. failed: whether a result sets the exit code to 1.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _, *others = inspect.signature(function, eval_str=True).parameters.values()
        without_reporter = _with_signature(lambda **given: function(Reporter(Console(), as_options), **given), others)
        without_reporter.__name__, without_reporter.__doc__ = function.__name__, function.__doc__
        inner = spread(without_reporter)

        def run(as_json: bool = False, **given: Any) -> None:
            from blockpruner.cluster.session import interruptible
            from blockpruner.files import plain
            from blockpruner.showing.libraries import quiet_libraries

            quiet_libraries()
            goes_on = resumable(**given) if callable(resumable) else resumable
            with errors_in_one_line(resumable=goes_on), interruptible():
                result = inner(**given)
                if as_json:
                    print(json.dumps(plain(result), allow_nan=False), flush=True)
            if failed(result):
                raise typer.Exit(1)

        parameters = inspect.signature(inner).parameters.values()
        as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
        _with_signature(run, [*parameters, as_json])
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name, epilog="\n".join([*notes, "", f"Example: {example}"]).strip())(run)
        return function

    return register


def _with_signature(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


@contextmanager
def errors_in_one_line(*, resumable: bool = False) -> Iterator[None]:
    """Print errors in one line and exit with 2 for UserError, 1 for SearchFailed and 130 for Ctrl-C.

    So does an OSError of the surroundings, which no check can foresee: a full disk, a name that is too long. Other
    exceptions are bugs and show their traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {as_options(str(error))}", file=sys.stderr)
        raise typer.Exit(2) from None
    except SearchFailed as error:
        print(f"failed: {as_options(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    except BrokenPipeError:
        # What reads our output has ended, as `head` does. Nothing more can be said there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        shown = "a file" if error.filename is None else short(error.filename)  # writing to an open file names none
        print(f"error: cannot use {shown}: {SURROUNDINGS[error.errno]}.", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second interrupt must not change the exit
            signal.signal(number, signal.SIG_IGN)
        done = "run the same command again to resume" if resumable else "nothing was written"
        print(f"stopped; {done}", file=sys.stderr)
        raise typer.Exit(130) from None


WrongUsage: Any = typer.BadParameter.__base__
"""Base class of all Typer exceptions for a wrong command line. Typer exports only the subclass."""


def main() -> None:
    """Run the console script. Wrong options also give one line and exit code 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # turns off the bars of libraries; tqdm reads it at import
    try:
        code = app(standalone_mode=False)
    except WrongUsage as error:
        message = " ".join(error.format_message().split())
        if message:  # empty if the help was printed instead
            print(f"error: {message} (--help shows the options)", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
