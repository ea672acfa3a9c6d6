"""Opens the replicas of a search and chooses the sizes of their calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from blockpruner.cluster.metrics import Metrics
from blockpruner.cluster.nodes import Needs, default_threads
from blockpruner.cluster.opening import PROCESS_BYTES, Say, open_scorer
from blockpruner.cluster.preflight import device_bytes
from blockpruner.engine.compensation.replica import TOKENS_PER_CALL
from blockpruner.engine.compensation.searching import CompensatingReplica, CompensatingSpec
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.model.loading import stored_dtype
from blockpruner.engine.scoring.narrowing import NarrowingReplica, NarrowingSpec
from blockpruner.engine.scoring.probe import is_batch_invariant
from blockpruner.engine.scoring.replica import Replica
from blockpruner.engine.scoring.scorer import LocalScorer, OutOfMemory, Scorer
from blockpruner.engine.scoring.scoring import ScoringReplica, ScoringSpec
from blockpruner.engine.work.memory import GIB, Placement, resolve_placement, smallest_sweep_bytes, what_fits
from blockpruner.engine.work.units import KernelShape, kernel_shape, sweep_bytes
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import Job


@dataclass
class Replicas:
    """The replicas that score a job."""

    scorer: Scorer
    kernel: KernelShape
    placement: Placement
    num_devices: int
    """Devices per replica."""
    job: Job
    device_bytes: int
    metrics: Metrics

    def shrink(self, kernel: KernelShape, reason: str, say: Say) -> KernelShape:
        """Return a smaller kernel shape after a device ran out of memory. Raises SearchFailed if there is none."""
        smaller = kernel.halved()
        if smaller is None:
            working_bytes = _smallest_sweep(self.job)
            raise SearchFailed(
                f"the device ran out of memory even with the smallest calls ({reason}). With {self.placement} "
                f"placement, the weights and one such call need about "
                f"{(self._weights_bytes() + working_bytes) / GIB:.1f} GiB; the device has "
                f"{self.device_bytes / GIB:.1f} GiB, and other programs may be using it; "
                f"{what_fits(self.job.sizes, self.device_bytes, working_bytes)}."
            )
        say(
            f"out of memory ({reason}): reducing sequences per call from {kernel.rows} to {smaller.rows} and masks per "
            f"sweep from {kernel.masks} to {smaller.masks}"
        )
        return smaller

    def _weights_bytes(self) -> int:
        return self.job.sizes.on_device(self.placement, self.num_devices)


@contextmanager
def open_replicas(
    config: SearchConfig, job: Job, recorded: KernelShape | None, say: Say, run: str
) -> Iterator[Replicas]:
    """Open a scorer whose replicas load in the background, with the recorded kernel shape or a new one.

    With config.address, Ray must have joined the cluster. run: name of the run for dashboards.
    """
    threads = recorded.threads if recorded else default_threads(config)
    with ExitStack() as stack:
        replicas = _held(config, job, threads, stack) if job.decoder else _opened(config, job, threads, stack, say, run)
        if recorded:
            replicas.kernel = recorded
        else:
            replicas.kernel = _kernel(job, threads, replicas.scorer.free_bytes())
            replicas.kernel = _probed(replicas, say)
        yield replicas


def _held(config: SearchConfig, job: Job, threads: int, stack: ExitStack) -> Replicas:
    """Use the model that the caller passed as the only replica, in this process."""
    assert job.decoder is not None
    torch.set_num_threads(threads)
    replica: Replica
    if job.is_cut:
        narrowing = NarrowingReplica(job.decoder, job.windows.tokens, config.units.cut, config.metric)
        stack.callback(narrowing.release)
        replica = narrowing
    elif job.fit is None:
        replica = ScoringReplica(job.decoder, job.windows.tokens, config.metric)
    else:
        compensating = CompensatingReplica(
            job.decoder, job.windows.tokens, job.fit.windows.tokens, TOKENS_PER_CALL[job.device]
        )
        stack.callback(compensating.release)
        replica = compensating
    device_memory = device_bytes(job.device) or psutil.virtual_memory().available
    scorer, kernel = LocalScorer(replica), _kernel(job, threads, None)
    return Replicas(scorer, kernel, Placement.RESIDENT, 1, job, device_memory, Metrics())


def _opened(config: SearchConfig, job: Job, threads: int, stack: ExitStack, say: Say, run: str) -> Replicas:
    search = _Search(config, job, threads, say)
    opened = stack.enter_context(open_scorer(config, search, say, run))
    kernel = _kernel(job, threads, None)
    placement, num_devices = search.spec.placement, search.spec.num_devices
    return Replicas(opened.scorer, kernel, placement, num_devices, job, opened.device_bytes, opened.metrics)


class _Search:
    """Implements `opening.Assignment`."""

    spec: ScoringSpec
    """Set by `settle`."""

    def __init__(self, config: SearchConfig, job: Job, threads: int, say: Say) -> None:
        self.model, self.device, self.threads = job.model, job.device, threads
        scored = job.windows.tokens
        self.data: Any = scored if job.fit is None else (scored, job.fit.windows.tokens)
        self.result_bytes = 0 if job.fit is None else job.fit.memory.result_bytes + _fitted_bytes(job)
        self.num_gpus = (config.gpus_per_replica or 1) if job.device == "cuda" else 0
        self._config, self._job, self._say = config, job, say

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[ScoringSpec, Needs]:
        self.spec = _spec(self._config, self._job, self.threads, memory_bytes, gpus_per_node, self._say)
        return self.spec, _needs(self._config, self._job, self.spec)


def _spec(config: SearchConfig, job: Job, threads: int, memory_bytes: int, gpus_per_node: int, say: Say) -> ScoringSpec:
    on_gpu = job.device == "cuda"
    placement, num_devices = resolve_placement(
        config.placement,
        job.sizes,
        memory_bytes,
        on_gpu=on_gpu,
        gpus_per_replica=config.gpus_per_replica,
        gpus_per_node=gpus_per_node,
        working_bytes=_working_bytes(job) if on_gpu else _working_bytes(job) + PROCESS_BYTES,
    )
    say(
        f"{placement} model ({'as asked: ' if config.placement != 'auto' else ''}{job.sizes.total / GIB:.2f} GiB of "
        f"weights, {memory_bytes / GIB:.1f} GiB {'on a GPU' if on_gpu else 'of free memory'})"
    )
    spec = ScoringSpec(
        model=job.model,
        dtype=job.dtype,
        device=job.device,
        placement=placement,
        num_devices=num_devices,
        threads=threads,
        metric=config.metric,
    )
    if job.is_cut:
        return NarrowingSpec(**vars(spec), kinds=config.units.cut)
    return spec if job.fit is None else CompensatingSpec(**vars(spec), tokens_per_call=TOKENS_PER_CALL[job.device])


def _needs(config: SearchConfig, job: Job, spec: ScoringSpec) -> Needs:
    if spec.device == "cuda":
        return Needs(spec.threads, spec.num_devices)
    is_mapped = stored_dtype(job.model) == job.dtype
    weights = 0 if is_mapped else job.sizes.on_device(spec.placement)
    if is_mapped and job.is_cut:  # in another order they are no longer those of the file
        blocks = (block for block in (*job.shape.mha, *job.shape.mlp) if block.num_channels)
        weights = job.bytes_per_value * sum(block.num_parameters for block in blocks)
        if spec.placement is Placement.STREAMED:  # only those of the layers at hand
            weights = min(weights, job.sizes.on_device(spec.placement))
    least = PROCESS_BYTES + weights + _working_bytes(job)
    if config.replicas is not None:
        return Needs(spec.threads, 0, least_bytes=least)
    kernel = _kernel(job, spec.threads, free_bytes=None)
    sweep = sweep_bytes(job.shape, kernel, seq_len=job.windows.seq_len, bytes_per_value=job.bytes_per_value)
    sweep += _working_bytes(job) - _smallest_sweep(job)
    return Needs(spec.threads, 0, memory_bytes=PROCESS_BYTES + weights + sweep, least_bytes=least)


def _working_bytes(job: Job) -> int:
    """Memory of a replica besides the model: of its smallest sweep, and of refits."""
    if job.fit is None:
        return _smallest_sweep(job)
    streams = job.fit.memory.stream_bytes(job.fit.windows.tokens.numel(), job.bytes_per_value)
    return _smallest_sweep(job) + job.fit.memory.sums_bytes + _fitted_bytes(job) + streams


def _fitted_bytes(job: Job) -> int:
    """Size of the weights of a refit, at most."""
    assert job.fit is not None
    return job.shape.num_blocks * job.fit.memory.widest * job.shape.hidden_size * job.bytes_per_value


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
    """Test whether a score depends on which masks share its batch, with smaller calls if memory runs out."""
    kernel, windows = replicas.kernel, replicas.job.windows
    while True:
        found = is_batch_invariant(
            replicas.scorer,
            replicas.job.shape,
            kernel,
            num_windows=windows.num_windows,
            seq_len=windows.seq_len,
            removed=replicas.job.space.units,
        )
        if isinstance(found, OutOfMemory):
            kernel = replicas.shrink(kernel, found.reason, say)
            continue
        if not found:
            say(
                "note: with this device, model or length of windows a score can depend on which masks share its batch, "
                "so batches will not be split further"
            )
        return replace(kernel, batch_invariant=found)
