"""Replicas for a job: in this process where one is enough, else Ray actors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from cluster.config import SearchConfig
from cluster.job import Job
from cluster.placement import Needs, Node, check_feasible, default_threads, describe, local_cpus, this_machine
from cluster.preflight import check, check_one_kind, device_bytes, hardware
from cluster.session import demand, ray_session
from engine.errors import SearchFailed, UserError
from engine.loading import stored_dtype
from engine.memory import GIB, resolve_placement, smallest_sweep_bytes, what_fits
from engine.scoring import LocalScorer, MaskScorer, OutOfMemory, ReplicaSpec, Scorer, is_batch_invariant
from engine.units import KernelShape, kernel_shape, sweep_bytes

PROCESS_BYTES = 2**29
"""Of a replica beside weights and sweeps: Python, torch and transformers."""
START_S = 120.0
"""In which a replica's process surely starts where it has a place: it imports torch and transformers."""
Say = Callable[[str], None]


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
    with ExitStack() as stack:
        open_on = _on_this_machine if config.address is None else _on_cluster
        scorer, spec, memory_bytes = open_on(config, job, threads, stack, say)
        kernel = recorded or _kernel(job, threads, scorer.free_bytes())
        replicas = Replicas(scorer, kernel, spec, job, memory_bytes)
        if recorded is None:
            replicas.kernel = _probed(replicas, say)
        scorer.use(replicas.kernel)
        yield replicas


def _on_this_machine(
    config: SearchConfig, job: Job, threads: int, stack: ExitStack, say: Say
) -> tuple[Scorer, ReplicaSpec, int]:
    here = this_machine(job.device)
    check_one_kind({here.name: hardware(job.device)}, allow_mixed=config.allow_mixed)
    memory_bytes = device_bytes(job.device) or here.memory_bytes
    spec = _spec(config, job, threads, memory_bytes, here.num_gpus, say)
    needs = _needs(config, job, spec)
    check_feasible([here], replace(needs, num_cpus=1, memory_bytes=0))
    fit = max(1, needs.fit(here))
    most = config.replicas or (1 if config.no_ray else fit)
    if job.device == "cuda" and most > fit:
        raise UserError(
            f"expected at most {fit} replicas of {needs} each, since {describe([here])}, got {most}; use fewer "
            f"--replicas."
        )
    reason = "as asked" if config.replicas else "--no-ray: in this process" if config.no_ray else _limit(needs, here)
    shared = f", though the CPUs hold {fit}: they will share cores" if most > fit else ""
    say(f"{most} {'replica' if most == 1 else 'replicas'} of {needs} ({reason}{shared})")
    if most == 1:
        return LocalScorer(MaskScorer(spec, job.windows.tokens)), spec, memory_bytes
    stack.enter_context(ray_session(None, max(local_cpus(), most * threads), here.num_gpus))
    from cluster.dispatch import Dispatcher
    from cluster.fleet import RayFleet  # only now: ray_session has set the environment

    fleet = RayFleet(spec, job.windows.tokens, needs, expected=None)
    waits = {"task_timeout_s": config.task_timeout_s, "patience_s": START_S}
    needs = replace(needs, memory_bytes=0)  # it was counted above
    return stack.enter_context(Dispatcher(fleet, needs, most, say, **waits)), spec, memory_bytes


def _on_cluster(
    config: SearchConfig, job: Job, threads: int, stack: ExitStack, say: Say
) -> tuple[Scorer, ReplicaSpec, int]:
    from cluster.dispatch import Dispatcher
    from cluster.fleet import RayFleet, cluster_nodes, survey_nodes  # only now: Ray has been joined

    least = Needs(threads, (config.gpus_per_replica or 1) if job.device == "cuda" else 0)
    stack.enter_context(demand(least.num_cpus, least.num_gpus, config.replicas or 1))
    nodes = _wait_for_nodes(cluster_nodes, least, config.resource_timeout_s, say)
    surveys = survey_nodes(nodes, job.model, job.device)
    check(surveys, allow_mixed=config.allow_mixed)
    gpu_sizes = [found.device_bytes for found in surveys.values() if found.device_bytes is not None]
    memory_bytes = min(gpu_sizes or [node.memory_bytes for node in nodes])
    spec = _spec(config, job, threads, memory_bytes, max(node.num_gpus for node in nodes), say)
    needs = _needs(config, job, spec)
    check_feasible(nodes, needs)
    fit = sum(needs.fit(node) for node in nodes)
    number = f"{fit}" if config.replicas is None else f"{min(fit, config.replicas)} of {config.replicas}"
    say(f"replicas of {needs}: {number} have a place, nodes: {len(nodes)}; nodes that join later are used, too")
    fleet = RayFleet(spec, job.windows.tokens, needs, next(iter(surveys.values())), allow_mixed=config.allow_mixed)
    waits = {"task_timeout_s": config.task_timeout_s, "patience_s": max(START_S, config.resource_timeout_s)}
    return stack.enter_context(Dispatcher(fleet, needs, config.replicas, say, **waits)), spec, memory_bytes


def _wait_for_nodes(find: Callable[[], Sequence[Node]], needs: Needs, patience_s: float, say: Say) -> list[Node]:
    """The nodes that can hold a replica, as soon as there is one."""
    began, next_word_s = time.monotonic(), 0.0
    while True:
        nodes = find()
        check_feasible(nodes, needs)
        if fitting := [node for node in nodes if needs.fit(node)]:
            return fitting
        waited_s = time.monotonic() - began
        if waited_s >= patience_s:
            raise UserError(
                f"no resources: a replica needs {needs} on one node; after {waited_s:.0f} s the cluster has "
                f"{describe(nodes)}. Add nodes, or raise --resource-timeout-s if they are on their way."
            )
        if waited_s >= next_word_s:
            say(f"waiting for a node with {needs} (now {describe(nodes)}); giving up in {patience_s - waited_s:.0f} s")
            next_word_s = max(10.0, 2 * waited_s)
        time.sleep(1.0)


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


def _limit(needs: Needs, node: Node) -> str:
    """Why there are not more replicas."""
    if needs.num_gpus:
        return "all GPUs used"
    if replace(needs, memory_bytes=0).fit(node) > needs.fit(node):
        return f"more do not fit {node.memory_bytes / GIB:.1f} GiB of free memory"
    return "all CPUs used"


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
            say("note: here a score depends on its company; chunks of masks stay as they are on any replicas")
        return replace(kernel, batch_invariant=found)
