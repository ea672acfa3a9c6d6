"""Code that comes with a model, and what it does wrong."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import ModelSource

Given = ParamSpec("Given")
Returned = TypeVar("Returned")
FOLDER = "transformers_modules"
"""The folder of transformers' cache from which code of models runs."""


def remote_code_told(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Decorate a function that may run code of a model: what goes wrong in that code becomes a UserError.

    `os._exit` cannot be caught: the process just ends.
    """

    @wraps(function)
    def told(*given: Given.args, **more: Given.kwargs) -> Returned:
        try:
            return function(*given, **more)
        except (Exception, SystemExit) as raised:
            # What reads the user's files may have made a message of the error already.
            error = raised.__cause__ if isinstance(raised, UserError) and raised.__cause__ is not None else raised
            sources = [one for one in (*given, *more.values()) if isinstance(one, ModelSource)]
            if not sources or not sources[0].trust_remote_code or (where := _where(error)) is None:
                raise
            does = "ends the program" if isinstance(error, SystemExit) else f"fails with {type(error).__name__}"
            raise UserError(
                f"the code that comes with {sources[0].name!r} {does} ({where}); it cannot be used as it is."
            ) from error

    return told


def _where(error: BaseException) -> str | None:
    """Return the last place in the code of a model that led to the error, or None for errors of other code."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        # transformers parses the file for its imports before it runs it, and gives it no name then.
        places.append((error.filename or "", error.lineno))
        if error.filename == "<unknown>":
            return f"line {error.lineno}"
    found = [(Path(name).name, line) for name, line in places if name and FOLDER in Path(name).parts]
    return f"{found[-1][0]}, line {found[-1][1]}" if found else None
