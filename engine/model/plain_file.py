"""Whether something in a model's folder is a file that can be read. Nothing is opened before its kind is known, because
opening a FIFO waits for ever."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from blockpruner.engine.errors import UserError

GIT_LFS = b"version https://git-lfs"
"""How a file begins that Git LFS leaves in place of a large one."""
LARGEST_JSON = 2**28
"""Bytes of the largest JSON file to read. The index of a model with 100,000 tensors has 10 MB."""


def check_kind(file: Path) -> None:
    """Raise UserError unless this is a file, which can be opened without waiting."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if file.is_symlink():
            where = f"a link to {os.readlink(file)!r}, which cannot be followed"
            raise UserError(f"expected a file, got {str(file)!r}, {where}; repair the link.") from error
        raise UserError(f"expected the file {str(file)!r}, found none that can be read ({error.strerror}).") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise UserError(f"expected a file, got {str(file)!r}, which is {kind}.")


def check_file(file: Path) -> None:
    """Raise UserError unless this is a file that can be read and that holds its own content."""
    check_kind(file)
    try:
        with file.open("rb") as stream:
            start = stream.read(len(GIT_LFS))
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r} ({error.strerror}); make it readable for this user.") from error
    if start == GIT_LFS:
        raise UserError(
            f"expected the content of {str(file)!r}, got the pointer that Git LFS leaves in its place; run 'git lfs "
            f"pull' in that folder."
        )
    if not start:
        raise UserError(f"expected the content of {str(file)!r}, got an empty file; download it again.")


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError."""
    check_file(file)
    if file.stat().st_size > LARGEST_JSON:
        raise UserError(f"expected {str(file)!r} to be at most {LARGEST_JSON // 2**20} MiB; it is no file of a model.")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without an end
        raise UserError(f"expected a JSON object in {str(file)!r}, got something else; download it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object in {str(file)!r}, got a {type(values).__name__}; download it again.")
    return values
