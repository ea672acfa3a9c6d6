"""Reads JSON files that people and other programs can damage. The shape is checked once, where a file is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from blockpruner.engine.blocks import Kind, is_part
from blockpruner.engine.errors import UserError
from blockpruner.engine.plain_file import check_kind

MAX_LAYER = 1_000_000
"""No model has as many layers. Larger numbers are damage."""
SHOWN = 60
"""Number of characters of a wrong value that a message shows."""


def _check_block(pair: object) -> object:
    match pair:
        case [str(kind), int(layer)] if kind in list(Kind) and type(layer) is int and 0 <= layer <= MAX_LAYER:
            return pair
        case [str(kind), int(layer), int(part)] if type(layer) is int and 0 <= layer <= MAX_LAYER:
            if type(part) is int and is_part(kind, part):
                return pair
    raise ValueError('expected a block such as ["mha", 5]')


BlockPair = Annotated[list[str | int], BeforeValidator(_check_block)]
"""A block or a group of one as `Block.to_json` gives it."""
Count = Annotated[int, Field(ge=0, le=10**30)]
Size = Annotated[int, Field(ge=1, le=2**63 - 1)]


def is_there(path: Path) -> bool:
    """Whether there is a file or folder. Raises UserError if that cannot be found out."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    return True


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises UserError for anything that is no readable file, such as a pipe."""
    if is_there(path):
        check_kind(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error


def parse_json(text: bytes, *, nan_is_null: bool = False) -> Any:
    """Parse UTF-8 text. Raises ValueError for what is not JSON or cannot be meant: NaN, infinity, a key that stands
    twice in an object, and nesting too deep to read.

    nan_is_null: accept NaN and infinity, and return None for them.
    """

    def number(digits: str) -> float | None:
        value = float(digits)
        if math.isfinite(value):
            return value
        if nan_is_null:
            return None
        raise ValueError(f"{digits[:SHOWN]} is not a finite number")

    try:
        value = json.loads(text.decode("utf-8"), parse_float=number, parse_constant=number, object_pairs_hook=_no_twins)
        if b"\\ud" in text.lower():  # half of a character cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise ValueError("a text in it is not Unicode") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at line {error.lineno}, column {error.colno}") from error


def read_json(path: Path, shape: Any, then: str, *, called: str = "") -> Any:
    """Return the content of a JSON file after a check of its shape. Values are returned as they stand in the file.

    shape: a type that pydantic knows. then: what to do about a damaged file, as the end of the message. called: what
    the file is called there. Raises UserError naming the file, the place in it and what was expected there.
    """
    where = called or repr(str(path))
    text = read_bytes(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); {then}.") from error
    check_shape(value, shape, where, then)
    return value


def check_shape(value: Any, shape: Any, where: str, then: str) -> None:
    """Raise UserError unless a value parsed from JSON has the shape."""
    if found := misfit(value, shape):
        raise UserError(f"{where} is damaged ({found}); {then}.")


def misfit(value: Any, shape: Any) -> str:
    """Describe the first place where a value does not have the shape, or return an empty string."""
    try:
        TypeAdapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        return told(error)
    except RecursionError:
        return "it is nested too deeply"
    return ""


def told(error: ValidationError) -> str:
    """Describe the first error in one line: the place, what was expected and what was given."""
    first = error.errors(include_url=False)[0]
    place = ".".join(
        ascii(str(part))[1:-1][:SHOWN] for part in first["loc"] if not str(part).startswith(("function-", "list["))
    )
    if first["type"] == "missing":
        return f"{place!r} is missing"
    says = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    says = says.replace("Input should be", "expected")
    given = repr(first["input"])
    shown = given if len(given) <= SHOWN else f"{given[:SHOWN]}…"
    return f"{place or 'content'}: {says[:1].lower()}{says[1:]}, got {shown}"


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _twice([key for key, _ in pairs])
    return found


def _twice(keys: list[str]) -> NoReturn:
    key = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"the key {key[:SHOWN]!r} stands twice in one object")
