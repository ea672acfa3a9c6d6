"""Permissions of written files. Some libraries write files that only their owner can read, which keeps out other users,
containers and Ray workers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def ordinary_modes(folder: Path) -> None:
    """Give a folder and all that is in it the permissions of newly made files and folders, as the umask says."""
    probe = folder / ".probe"  # the umask itself can only be read by changing it for the whole process
    probe.mkdir()
    ordinary = probe.stat().st_mode & 0o777
    probe.rmdir()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = ordinary if path.is_dir() else ordinary & 0o666
            with suppress(OSError):  # some file systems have no permissions to change
                path.chmod(path.stat().st_mode & 0o7000 | mode)
