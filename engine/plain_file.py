"""Checks that a path is a file that can be read, before it is opened: opening a FIFO would wait for a writer."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blockpruner.engine.errors import UserError

GIT_LFS = b"version https://git-lfs"
"""How a file begins that Git LFS leaves in place of a large one."""


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
