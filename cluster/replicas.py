"""Replicas for a job: in this process where one is enough, else Ray actors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from cluster.config import SearchConfig
from cluster.job import Job
from cluster.placement import cluster_nodes, default_threads, local_cpus, place, this_machine
from cluster.progress import Reporter
from cluster.session import ray_session
from engine.loading import DTYPES
from engine.scoring import LocalScorer, MaskScorer, Scorer
from engine.units import KernelShape, kernel_shape


@contextmanager
def open_scorer(
    config: SearchConfig, job: Job, recorded: KernelShape | None, reporter: Reporter
) -> Iterator[tuple[Scorer, KernelShape]]:
    """A scorer whose replicas are loaded, and its kernel shape: the recorded one, or one that is resolved now."""
    threads = recorded.threads if recorded else default_threads(config)
    with ExitStack() as stack:
        if config.address is not None:
            stack.enter_context(ray_session(config.address, local_cpus()))
            placement = place(config, job.device, cluster_nodes(), threads)
        else:
            placement = place(config, job.device, [this_machine(job.device)], threads)
        name = "replica" if placement.num_replicas == 1 else "replicas"
        reporter.say(f"{placement.num_replicas} {name} ({placement.reason})")
        scorer: Scorer
        if config.address is None and placement.num_replicas == 1:
            windows = job.windows.tokens
            model = MaskScorer(job.model, dtype=job.dtype, device=job.device, windows=windows, threads=threads)
            scorer = LocalScorer(model)
        else:
            if config.address is None:
                stack.enter_context(ray_session(None, max(local_cpus(), placement.num_replicas * threads)))
            from cluster.dispatch import RayScorer, ReplicaSpec  # only now: ray_session has set the environment

            spec = ReplicaSpec(
                job.model, job.dtype, job.device, job.windows.tokens, placement.threads, placement.num_gpus
            )
            scorer = stack.enter_context(RayScorer(spec, placement.num_replicas, reporter.say))
        kernel = recorded or _resolve_kernel(scorer, job, threads, reporter)
        scorer.use(kernel)
        yield scorer, kernel


def _resolve_kernel(scorer: Scorer, job: Job, threads: int, reporter: Reporter) -> KernelShape:
    kernel = kernel_shape(
        job.shape,
        seq_len=job.windows.seq_len,
        num_windows=job.windows.num_windows,
        bytes_per_value=DTYPES[job.dtype].itemsize,
        threads=threads,
    )
    kernel = replace(kernel, batch_invariant=scorer.is_batch_invariant(kernel))
    if not kernel.batch_invariant:
        reporter.say("note: here a score depends on its company; chunks of masks stay as they are on any replicas")
    return kernel
