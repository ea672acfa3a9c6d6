"""Checks what surrounds the command before torch and Ray are imported, which read it in their own ways."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from typing import TextIO


def check_environment() -> None:
    """Exit with code 2 and one line if the command cannot work here."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            _take_any_character(stream)
    if problem := _problem():
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def _take_any_character(stream: TextIO) -> None:
    """A path may hold characters that the terminal's encoding lacks."""
    stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def _problem() -> str | None:
    try:
        os.getcwd()
    except OSError:
        return "the working directory does not exist any more; change to another one."
    threads = os.environ.get("OMP_NUM_THREADS", "").strip()
    if threads and not re.fullmatch(r"0*[1-9]\d{0,3}(,0*[1-9]\d{0,3})*", threads, re.ASCII):
        return (
            f"expected a number of threads from 1 to 9999 in the environment variable OMP_NUM_THREADS, "
            f"got {threads!r}; set it, or unset it to use all cores."
        )
    try:
        tempfile.gettempdir()
    except OSError:
        return "no folder for temporary files can be written to; set TMPDIR to one that can."
    return None
