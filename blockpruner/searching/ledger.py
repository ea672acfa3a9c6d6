"""Append-only files of JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from blockpruner.engine.errors import UserError


def append_line(stream: TextIO, line: dict[str, Any]) -> None:
    """Append one JSON object, then flush and sync."""
    try:
        stream.write(json.dumps(line, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {stream.name!r}: {error.strerror}; its content is safe, and the same command resumes from "
            f"there."
        ) from error


def parse_ledger(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return all complete lines and their size in bytes. An incomplete last line is ignored."""
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    lines = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise damaged(path, number) from None
    return lines, len(complete)


def damaged(path: Path, number: int) -> UserError:
    """Return the error for a line that cannot be read."""
    return UserError(
        f"{str(path)!r} is damaged in line {number}; delete that line and all later ones to resume from there, or "
        f"choose another `out`."
    )
