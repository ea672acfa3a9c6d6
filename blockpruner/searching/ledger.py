"""Append-only files of JSON lines, chained so that an edit is noticed.

Each line ends with `"chain"`: a hash of its own text and of all lines before it. So no line can be changed, moved,
dropped from the middle or added without a trace; lines that are missing at the end were not written. Files of earlier
versions have no chain. When one of them grows, its new lines are chained to the old ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import is_there, parse_json, read_bytes

if TYPE_CHECKING:
    from hashlib import _Hash

CHAIN = re.compile(rb', "chain": "([0-9a-f]{16})"\}')


class _Content(NamedTuple):
    lines: list[dict[str, Any]]
    num_bytes: int
    """Size of all complete lines."""
    digest: _Hash
    """Of the text of all lines without their chain."""


class Ledger:
    """A file of JSON lines that is open to append to. Nothing is written before the first append."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if a line is damaged, and OSError if the file cannot be written."""
        self._path, self._is_new = path, not is_there(path)
        self.lines, self._num_bytes, self._digest = _read(path)
        self.has_grown = False
        self._stream = path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        """Append one object, then flush and sync. An incomplete last line of an interrupted session is dropped."""
        text = json.dumps(line, allow_nan=False)
        digest = _extended(self._digest, text.encode())
        try:
            if not self.has_grown:
                os.truncate(self._path, self._num_bytes)
            self._stream.write(f'{text[:-1]}, "chain": "{_shown(digest)}"}}\n')
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {str(self._path)!r}: {error.strerror}; its content is safe, and the same command "
                f"resumes from there."
            ) from error
        self._digest, self.has_grown = digest, True

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            if self._is_new and not self.has_grown:
                self._path.unlink(missing_ok=True)


def parse_ledger(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return all complete lines and their size in bytes. An incomplete last line is ignored.

    Raises UserError if another line is damaged.
    """
    content = _read(path)
    return content.lines, content.num_bytes


def damaged(path: Path, number: int, what: str = "") -> UserError:
    """Return the error for a line that is not as it was written."""
    return UserError(
        f"{str(path)!r} is damaged in line {number}{what and f' ({what})'}; delete that line and all later ones to "
        f"resume from there, or choose another `out`."
    )


def _read(path: Path) -> _Content:
    digest = hashlib.sha256()
    if not is_there(path):
        return _Content([], 0, digest)
    data = read_bytes(path)
    complete = data[: data.rfind(b"\n") + 1]
    lines: list[dict[str, Any]] = []
    num_chained = 0
    for number, text in enumerate(complete.split(b"\n")[:-1], start=1):
        chain = CHAIN.search(text, max(0, len(text) - 64))
        if chain is not None and chain.end() != len(text):
            chain = None
        own = text if chain is None else text[: chain.start()] + b"}"
        digest = _extended(digest, own)
        if chain is None and num_chained:
            raise damaged(path, number, "it is not chained to the lines before it")
        if chain is not None and chain[1].decode() != _shown(digest):
            if number > 1 and not num_chained:
                raise UserError(
                    f"{str(path)!r} is damaged in one of the lines 1 to {number}; restore it, or choose another `out`."
                )
            raise damaged(path, number, "it, or its place, is not what was written")
        num_chained += chain is not None
        try:
            line = parse_json(own)
        except ValueError as error:
            raise damaged(path, number, str(error)) from error
        if not isinstance(line, dict):
            raise damaged(path, number, "it is no object")
        lines.append(line)
    return _Content(lines, len(complete), digest)


def _extended(digest: _Hash, text: bytes) -> _Hash:
    longer = digest.copy()
    longer.update(text + b"\n")
    return longer


def _shown(digest: _Hash) -> str:
    return digest.hexdigest()[:16]
