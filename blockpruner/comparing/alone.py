"""Shared code of methods that run in one process, without replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from blockpruner.cluster.nodes import default_threads, local_cpus
from blockpruner.cluster.preflight import device_bytes
from blockpruner.engine.model.full_memory import full_memory_ends
from blockpruner.engine.model.host_memory import keep_freed_memory
from blockpruner.engine.work.memory import Placement, resolve_placement, smallest_sweep_bytes
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import Job, prepare
from blockpruner.showing.console import Reporter


@contextmanager
def alone(name: str, config: SearchConfig, reporter: Reporter) -> Iterator[Job]:
    """Prepare the model and the windows of a method, with as many threads as the replicas of a search have in total.

    Raises SearchFailed if memory runs out.
    """
    job = prepare(config, reporter)
    torch.set_num_threads(_num_threads(config))
    keep_freed_memory()
    with full_memory_ends(f"while {name} holds the model", "free it, use a smaller `dtype`, or leave the method out."):
        yield job


def place(config: SearchConfig, job: Job) -> Placement:
    """Choose the placement on one device: a model that does not fit is streamed."""
    working_bytes = smallest_sweep_bytes(job.shape, seq_len=job.windows.seq_len, bytes_per_value=job.bytes_per_value)
    placement, _ = resolve_placement(
        config.placement,
        job.sizes,
        device_bytes(job.device) or psutil.virtual_memory().available,
        on_gpu=job.device == "cuda",
        gpus_per_replica=1 if job.device == "cuda" else None,
        gpus_per_node=1,
        working_bytes=working_bytes,
    )
    return placement


def _num_threads(config: SearchConfig) -> int:
    threads = default_threads(config)
    if config.no_ray:
        return threads
    return local_cpus() if config.replicas is None else min(local_cpus(), config.replicas * threads)
