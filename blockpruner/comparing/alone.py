"""What methods have in common that run in one process, without replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from blockpruner.cluster.nodes import default_threads, local_cpus
from blockpruner.engine.model.host_memory import keep_freed_memory
from blockpruner.engine.scoring.scoring import full_memory_ends
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import Job, prepare
from blockpruner.showing.console import Reporter


@contextmanager
def alone(name: str, config: SearchConfig, reporter: Reporter) -> Iterator[Job]:
    """Model and windows of a method, with all threads that the replicas of a search would have together. Raises
    SearchFailed if the memory is full."""
    job = prepare(config, reporter)
    torch.set_num_threads(_num_threads(config))
    keep_freed_memory()
    with full_memory_ends(f"while {name} holds the model", "free it, use a smaller --dtype, or leave the method out."):
        yield job


def _num_threads(config: SearchConfig) -> int:
    threads = default_threads(config)
    if config.no_ray:
        return threads
    return local_cpus() if config.replicas is None else min(local_cpus(), config.replicas * threads)
