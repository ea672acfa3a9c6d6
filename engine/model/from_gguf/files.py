"""Finds a GGUF, which may be in parts, and reads it whole."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.header import Content, Raw, read_gguf
from blockpruner.engine.model.from_gguf.packaged import packaged_file
from blockpruner.engine.model.source import PACKAGED

SUFFIX = ".gguf"
PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
"""How llama.cpp names the parts of a file, counted from 1."""


def is_gguf(name: str) -> bool:
    """Whether the name of a model stands for a GGUF."""
    return name in PACKAGED or (name.lower().endswith(SUFFIX) and not Path(name).is_dir())


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model name refers to, or None for other names. Raises UserError if it is missing."""
    if not is_gguf(name):
        return None
    if name in PACKAGED:
        return packaged_file(name)
    path = Path(name)
    if not path.is_file():
        fault = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"expected a GGUF file, got {name!r}, which {fault}.")
    return path


def parts_of(file: Path) -> list[Path]:
    """Return the files that the model is in: all parts if `file` is one of them, else only `file`.

    Raises UserError if a part is missing.
    """
    match = PART.fullmatch(file.name)
    if match is None or int(match["count"]) < 2:
        return [file]
    parts = []
    for number in range(1, int(match["count"]) + 1):
        part = file.with_name(f"{match['name']}-{number:05}-of-{match['count']}{match['suffix']}")
        if not part.is_file():
            raise UserError(f"expected all {int(match['count'])} parts of {str(file)!r}, but {part.name} is missing.")
        parts.append(part)
    return parts


def gguf_digest(file: Path) -> str:
    """Return the SHA-256 of a GGUF, over all its parts. It is computed once, unless a part changes."""
    parts = parts_of(file)
    try:
        digests = [_digest(part.resolve(), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r} as GGUF: {error.strerror or type(error).__name__}.") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest(part: Path, num_bytes: int, changed_ns: int) -> str:
    with part.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_whole(file: Path) -> Content:
    """Read a GGUF with all its parts. Raises UserError, in one line, for a file that is none or is incomplete."""
    parts = parts_of(file)
    contents = [read_gguf(part) for part in parts]
    fields, tensors = contents[0].fields, dict[str, Raw]()
    for number, (part, content) in enumerate(zip(parts, contents, strict=True)):
        found = content.fields.get("split.no", (0,))[0], content.fields.get("split.count", (1,))[0] or 1
        if found != (number, len(parts)):
            raise UserError(
                f"expected part {number + 1} of {len(parts)} in {str(part)!r} by its name, but its fields split.no "
                f"= {found[0]} and split.count = {found[1]} say otherwise; give all parts the names that "
                f"llama-gguf-split gave them."
            )
        differing = [
            name
            for name in content.fields
            if not name.startswith("split.") and content.fields[name] != fields.get(name)
        ]
        twice = [name for name in content.tensors if name in tensors]
        if differing or twice:
            raise UserError(
                f"expected {str(part)!r} to be a part of the same model as {parts[0].name}, but its "
                f"{(differing + twice)[0]} says otherwise."
            )
        tensors |= content.tensors
    expected = fields.get("split.tensors.count", (len(tensors),))[0]
    if expected != len(tensors):
        raise UserError(f"expected {expected} tensors in the parts of {str(file)!r}, found {len(tensors)}.")
    return Content({name: field for name, field in fields.items() if not name.startswith("split.")}, tensors)
