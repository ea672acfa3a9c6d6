"""Freed memory is used again: the system clears fewer pages."""

import resource
import sys

import pytest
import torch

from blockpruner.apart import run_apart
from blockpruner.engine.model.host_memory import keep_freed_memory


def page_faults(*, keep: bool) -> int:
    """While 20 tensors of 64 MiB are made and dropped: glibc itself keeps what is smaller."""
    if keep:
        keep_freed_memory()
    torch.zeros(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**24).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_tensors_that_are_dropped_leave_their_pages_to_the_next() -> None:
    fresh, kept = (run_apart(page_faults, keep=keep).value for keep in (False, True))
    assert kept < fresh / 2
