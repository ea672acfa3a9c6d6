"""Detect out-of-memory errors from torch, and turn them into a message for the user."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from blockpruner.engine.errors import DeviceMemoryError, SearchFailed, first_line

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts in torch's out-of-memory errors: from a GPU's allocator or driver, a CPU's allocator, and cuBLAS."""

Answer = TypeVar("Answer")


def is_out_of_memory(error: RuntimeError) -> bool:
    return any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def full_memory_ends(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error in this context into SearchFailed: "the memory is full `what` (...); `remedy`"."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise SearchFailed(f"the memory is full {what} ({first_line(error)}); {remedy}") from error


def within_memory(work: Callable[[], Answer], device: torch.device) -> Answer:
    """Return what `work` returns. Raises DeviceMemoryError if the device does not have enough memory for it."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    if device.type == "cuda":
        gc.collect()  # a reference cycle through the traceback may keep the failed work's tensors alive
        torch.cuda.empty_cache()
    raise DeviceMemoryError(reason)
