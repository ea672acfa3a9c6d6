"""Results that a benchmark keeps between runs: JSON lines with a header that says what they were computed from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blockpruner.engine.errors import UserError


class Kept:
    """A file of JSON lines. The first line, the header, says what the others were computed from."""

    def __init__(self, file: Path, header: dict[str, Any]) -> None:
        """header: plain values. Raises UserError if the file has no header or another one."""
        self._file, self._header = file, header
        self.lines: list[Any] = []
        if file.exists():
            lines, num_bytes = _read(file)
            self.lines = _below(lines, header, file)
            os.truncate(file, num_bytes)  # a torn last line

    def append(self, lines: Iterable[Any]) -> None:
        """Append lines to the file. `self.lines` keeps those that were there when it was opened."""
        with self._file.open("a", encoding="utf-8") as stream:
            for line in lines if stream.tell() else (self._header, *lines):
                stream.write(json.dumps(line) + "\n")


def kept_lines(file: Path, header: dict[str, Any]) -> list[Any]:
    """Return the lines after the header, or none if the file does not exist. Raises UserError if a value of `header` is
    missing in the file's header or differs."""
    return _below(_read(file)[0], header, file) if file.exists() else []


def _read(file: Path) -> tuple[list[Any], int]:
    """Return all complete lines and their size in bytes."""
    data = file.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in complete.splitlines()], len(complete)
    except ValueError as error:
        raise UserError(f"{str(file)!r} is damaged; choose another --out.") from error


def _below(lines: list[Any], header: dict[str, Any], file: Path) -> list[Any]:
    if not lines:
        return []
    theirs = lines[0]
    if not isinstance(theirs, dict) or not header.keys() <= theirs.keys():
        raise UserError(
            f"expected {str(file)!r} to begin with the line {json.dumps(header)}, got a file that does not say what it "
            f"was computed from; choose another --out."
        )
    if unlike := [f"{key} {value!r}, got {theirs[key]!r}" for key, value in header.items() if theirs[key] != value]:
        raise UserError(f"{str(file)!r} holds other scores: expected {'; '.join(unlike)}; choose another --out.")
    return lines[1:]
