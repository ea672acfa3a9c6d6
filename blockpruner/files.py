"""Writes files so that a crash leaves either the old or the new version."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.modes import ordinary_modes

LONGEST_NAME = 200
"""Characters of a name that a message shows."""


def plain(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def lock_folder(folder: Path) -> FileLock:
    """Lock a folder for this process, and create it if it does not exist."""
    lock = FileLock(folder / ".lock")
    try:
        if any(folder.glob("*.safetensors")):
            raise UserError(
                f"expected a folder for results, got {short(folder)}, which holds a model; choose another `out`."
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is using {short(folder)}; wait for it or choose another `out`.") from None
    except OSError as error:
        raise UserError(f"cannot write to {short(folder)}: {error.strerror}; choose another `out`.") from error
    return lock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. It replaces `path` on success and is deleted on failure."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(_not_written(path, aside, error)) from error
    finally:
        with suppress(OSError):
            aside.unlink()


def check_file(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`, or replaced there. Its folder is created if needed."""
    if path.is_dir():
        raise UserError(f"expected a file for `out`, got {short(path)}, which is a folder; name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent, prefix=f".{path.name}."):  # as `replacing` will
            pass
    except OSError as error:
        raise UserError(f"cannot write {short(path)}: {error.strerror}; choose another `out`.") from error


def check_new_folder(path: Path) -> None:
    """Raise UserError unless a folder can be created at `path`."""
    try:
        if os.path.lexists(path):
            raise UserError(
                f"expected an output folder that does not exist yet, got {str(path)!r}; choose another `out`."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}."):  # as `new_folder` will
            pass
    except OSError as error:
        raise UserError(f"cannot write to {short(path)}: {error.strerror}; choose another `out`.") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, which only its owner can read. It is renamed to `path` on success and
    deleted on failure."""
    check_new_folder(path)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield aside
        ordinary_modes(aside)
        aside.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(_not_written(path, aside, error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _not_written(path: Path, aside: Path, error: Exception) -> str:
    """Say which file is in the way: it need not be the output, but, for example, one in the cache."""
    number = re.search(r"os error (\d+)", str(error))  # as safetensors tells it
    told = error.strerror if isinstance(error, OSError) else os.strerror(int(number[1])) if number else None
    reason = told or first_line(error)
    other = getattr(error, "filename", None)
    if other is None or {path, aside} & {Path(os.fsdecode(other)), *Path(os.fsdecode(other)).parents}:
        return f"cannot write {short(path)}: {reason}."
    return (
        f"cannot write {short(path)}, since {short(other)} cannot be used: {reason}; if that is a "
        f"cache, set HF_HOME and BLOCKPRUNER_CACHE to other folders."
    )


def short(path: str | bytes | Path) -> str:
    """Return a path as messages show it: quoted, and not longer than a line."""
    text = os.fsdecode(path)
    return repr(text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}…")
