"""Host memory that is used again instead of given back.

A sweep makes and drops large tensors thousands of times. The C library maps one of more than 32 MiB anew each time, and
the system clears every page of it: on a CPU that took as long as the products that fill it.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h."""
KEPT_BYTES = 2**30
"""Freed memory beyond this goes back to the system."""


def keep_freed_memory() -> None:
    """For this process, from now on. Where the C library is not glibc nothing happens: results are the same, later."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
