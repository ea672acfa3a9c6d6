"""Open a file by its literal path, and never read more of it than fits.

No library gets to see the path: `datasets`, fsspec and pyarrow take `*`, `[`, `{` or `::` in it for a pattern or a
protocol, and then read another file.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from blockpruner.engine import plain_file
from blockpruner.engine.errors import UserError

NAMES = ("alpaca", "wikitext2", "builtin")
"""Named sets, which are no files."""
MAX_BYTES = 2 * 2**30
"""A text file may have at most this many bytes, after decompression."""
MAX_ROW = 16 * 2**20
"""A row, a line or a field may have at most this many bytes (of a text file, characters)."""
MAX_ROWS = 2**25
"""A file may have at most this many rows: a small file can hold any number of empty ones."""
HEAD = 64
FOREIGN = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it, or use .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard; unpack it, or use .gz"),
    (b"\x04\x22\x4d\x18", "compressed with lz4; unpack it, or use .gz"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"ARROW1", "an Arrow file; name it .arrow"),
    (b"GGUF", "a GGUF file, which is a model"),
    (b"\xff\xfe\x00\x00", "UTF-32; save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32; save it as UTF-8"),
    (b"\xff\xfe", "UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16; save it as UTF-8"),
)
"""Beginnings of files that are not UTF-8 text, and what they are."""


def check_file(source: str) -> Path:
    """Return the path of a regular file that is not empty. Raises UserError for anything else."""
    path = Path(source)
    if status(source) is None:
        dangling = f" (a link to {os.readlink(path)!r})" if path.is_symlink() else ""
        raise UserError(f"expected a text file, got {source!r}, which does not exist{dangling}.")
    plain_file.check_file(path)
    return path


def status(source: str) -> os.stat_result | None:
    """Return the status of a file or folder, or None if it does not exist. Raises UserError if it cannot be known."""
    try:
        return os.stat(source)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise unreadable(source, error) from error


def is_same_text(one: str, other: object) -> bool:
    """Whether a name and a recorded one can be the same file: by the same path, however it is written, or because the
    recorded path does not exist here, where a relative one may have another meaning. Then the tokens have to tell."""
    if one == other or not isinstance(other, str) or other in NAMES or one in NAMES or status(one) is None:
        return one == other
    return os.path.realpath(one) == os.path.realpath(other) or status(other) is None


def recorded_name(texts: Sequence[str]) -> str | list[str]:
    """Return what is recorded of one or several texts: names, or absolute paths."""
    return one_or_all([text if text in NAMES or status(text) is None else os.path.realpath(text) for text in texts])


def one_or_all(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts


def are_same_texts(texts: Sequence[str], recorded: object) -> bool:
    """Whether texts can be the recorded ones: see `is_same_text`."""
    others = [recorded] if isinstance(recorded, str) else recorded
    if not isinstance(others, list | tuple) or len(texts) != len(others):
        return False
    return all(is_same_text(one, other) for one, other in zip(texts, others, strict=True))


@contextmanager
def open_text(path: Path, source: str, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 text file, which may be compressed with gzip. newline: as for `open`.

    Raises UserError, also during reading, if the file is not UTF-8 text, is damaged or has more than MAX_BYTES.
    """
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            plain = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            limited = io.BufferedReader(_Limited(plain.read, source))
            _check_head(limited.peek(HEAD)[:HEAD], source)
            with io.TextIOWrapper(limited, encoding="utf-8-sig", newline=newline) as text:
                yield text
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 text in {source!r}, got other bytes ({error.reason}); save it as UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(source, error) from error


def lines(text: TextIO, source: str) -> Iterator[str]:
    """Yield the lines with their ends. Raises UserError if one has more than MAX_ROW characters, or if there are more
    than MAX_ROWS."""
    number = 0
    while line := text.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise too_long(source, f"line {number}")
        check_number(number, source)
        yield line


def check_number(num_rows: int, source: str) -> None:
    """Raise UserError if there are more than MAX_ROWS rows."""
    if num_rows > MAX_ROWS:
        raise UserError(f"expected at most {MAX_ROWS:,} rows, got more in {source!r}; use a part of it.")


def too_long(source: str, what: str) -> UserError:
    return UserError(
        f"expected rows of at most {MAX_ROW // 2**20} MiB, got a longer one in {what} of {source!r}; split it."
    )


def too_large(source: str) -> UserError:
    return UserError(
        f"expected at most {MAX_BYTES // 2**30} GiB of text (after decompression), got more in {source!r}; use a part "
        f"of it."
    )


def unreadable(source: str, error: Exception) -> UserError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"cannot read {source!r}: {' '.join(why.split()) or type(error).__name__}.")


def _check_head(head: bytes, source: str) -> None:
    what = next((what for start, what in FOREIGN if head.startswith(start)), None)
    if what is None and b"\x00" in head[:4]:
        what = "UTF-16 or no text at all; save it as UTF-8"
    if what is not None:
        raise UserError(f"expected UTF-8 text in {source!r}, got {what}.")


class _Limited(io.RawIOBase):
    """Reads from a stream, but raises UserError instead of giving more than MAX_BYTES."""

    def __init__(self, read: Callable[[int], bytes], source: str) -> None:
        self._read, self._source, self._num_bytes = read, source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._read(len(buffer))
        self._num_bytes += len(data)
        if self._num_bytes > MAX_BYTES:
            raise too_large(self._source)
        buffer[: len(data)] = data
        return len(data)
