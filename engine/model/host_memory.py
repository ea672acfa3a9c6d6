"""Reuse freed host memory instead of returning it to the system.

A sweep allocates and frees large tensors thousands of times. The C library maps every tensor above 32 MiB anew, and the
system clears each of its pages. On a CPU, this took as long as the matmuls that fill the tensor.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Constants from glibc's malloc.h."""
KEPT_BYTES = 2**30
"""Freed memory above this limit is returned to the system."""


def keep_freed_memory() -> None:
    """Keep freed memory in this process from now on. Has no effect without glibc: results are the same, but slower."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
