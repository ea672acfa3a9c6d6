"""Replicas for a search, and the sizes of their calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from blockpruner.cluster.nodes import Needs, default_threads
from blockpruner.cluster.opening import PROCESS_BYTES, Say, open_scorer
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.model.loading import stored_dtype
from blockpruner.engine.scoring.scoring import OutOfMemory, ReplicaSpec, Scorer, is_batch_invariant
from blockpruner.engine.work.memory import GIB, resolve_placement, smallest_sweep_bytes, what_fits
from blockpruner.engine.work.units import KernelShape, kernel_shape, sweep_bytes
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import Job


@dataclass
class Replicas:
    """What scores a job."""

    scorer: Scorer
    kernel: KernelShape
    spec: ReplicaSpec
    job: Job
    device_bytes: int

    def shrink(self, kernel: KernelShape, reason: str, say: Say) -> KernelShape:
        """The kernel shape to go on with after a device ran out of memory. Raises SearchFailed below the smallest."""
        smaller = kernel.halved()
        if smaller is None:
            working_bytes = _smallest_sweep(self.job)
            raise SearchFailed(
                f"the device ran out of memory even with the smallest calls ({reason}). Weights and one such call take "
                f"about {(self._weights_bytes() + working_bytes) / GIB:.1f} GiB, {self.spec.placement}; "
                f"the device has {self.device_bytes / GIB:.1f} GiB, which other programs may use; "
                f"{what_fits(self.job.sizes, self.device_bytes, working_bytes)}."
            )
        say(
            f"out of memory ({reason}): from now on {smaller.rows} sequences in a call and {smaller.masks} masks in a "
            f"sweep, not {kernel.rows} and {kernel.masks}"
        )
        return smaller

    def _weights_bytes(self) -> int:
        return self.job.sizes.on_device(self.spec.placement, self.spec.num_devices)


@contextmanager
def open_replicas(config: SearchConfig, job: Job, recorded: KernelShape | None, say: Say) -> Iterator[Replicas]:
    """A scorer whose replicas load, and its kernel shape: the recorded one, or one that is resolved now.

    With config.address, the cluster has been joined.
    """
    threads = recorded.threads if recorded else default_threads(config)
    assignment = _Search(config, job, threads, say)
    with open_scorer(config, assignment, say) as opened:
        kernel = recorded or _kernel(job, threads, opened.scorer.free_bytes())
        replicas = Replicas(opened.scorer, kernel, assignment.spec, job, opened.device_bytes)
        if recorded is None:
            replicas.kernel = _probed(replicas, say)
        yield replicas


class _Search:
    """Implements `opening.Assignment`."""

    spec: ReplicaSpec
    """Once it is settled."""

    def __init__(self, config: SearchConfig, job: Job, threads: int, say: Say) -> None:
        self.model, self.device, self.data, self.threads = job.model, job.device, job.windows.tokens, threads
        self._config, self._job, self._say = config, job, say

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[ReplicaSpec, Needs]:
        self.spec = _spec(self._config, self._job, self.threads, memory_bytes, gpus_per_node, self._say)
        return self.spec, _needs(self._config, self._job, self.spec)


def _spec(config: SearchConfig, job: Job, threads: int, memory_bytes: int, gpus_per_node: int, say: Say) -> ReplicaSpec:
    on_gpu = job.device == "cuda"
    placement, num_devices = resolve_placement(
        config.placement,
        job.sizes,
        memory_bytes,
        on_gpu=on_gpu,
        gpus_per_replica=config.gpus_per_replica,
        gpus_per_node=gpus_per_node,
        working_bytes=_smallest_sweep(job) if on_gpu else _smallest_sweep(job) + PROCESS_BYTES,
    )
    say(
        f"{placement} model ({'as asked: ' if config.placement != 'auto' else ''}{job.sizes.total / GIB:.2f} GiB of "
        f"weights, {memory_bytes / GIB:.1f} GiB {'on a GPU' if on_gpu else 'of free memory'})"
    )
    return ReplicaSpec(
        model=job.model,
        dtype=job.dtype,
        device=job.device,
        placement=placement,
        num_devices=num_devices,
        threads=threads,
        metric=config.metric,
    )


def _needs(config: SearchConfig, job: Job, spec: ReplicaSpec) -> Needs:
    if spec.device == "cuda":
        return Needs(spec.threads, spec.num_devices)
    if config.replicas is not None:
        return Needs(spec.threads, 0)
    is_mapped = stored_dtype(job.model) == job.dtype
    weights = 0 if is_mapped else job.sizes.on_device(spec.placement)
    kernel = _kernel(job, spec.threads, free_bytes=None)
    sweep = sweep_bytes(job.shape, kernel, seq_len=job.windows.seq_len, bytes_per_value=job.bytes_per_value)
    return Needs(spec.threads, 0, memory_bytes=PROCESS_BYTES + weights + sweep)


def _smallest_sweep(job: Job) -> int:
    return smallest_sweep_bytes(job.shape, seq_len=job.windows.seq_len, bytes_per_value=job.bytes_per_value)


def _kernel(job: Job, threads: int, free_bytes: int | None) -> KernelShape:
    return kernel_shape(
        job.shape,
        seq_len=job.windows.seq_len,
        num_windows=job.windows.num_windows,
        bytes_per_value=job.bytes_per_value,
        threads=threads,
        free_bytes=free_bytes,
    )


def _probed(replicas: Replicas, say: Say) -> KernelShape:
    """Try out whether scores depend on their company; where that does not fit the memory, with smaller calls."""
    kernel, windows = replicas.kernel, replicas.job.windows
    while True:
        found = is_batch_invariant(
            replicas.scorer, replicas.job.shape, kernel, num_windows=windows.num_windows, seq_len=windows.seq_len
        )
        if isinstance(found, OutOfMemory):
            kernel = replicas.shrink(kernel, found.reason, say)
            continue
        if not found:
            say("note: here a score may depend on its company; chunks of masks stay as they are on any replicas")
        return replace(kernel, batch_invariant=found)
