"""Opens replicas: one in this process if that is enough, else Ray actors on this machine or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from blockpruner.cluster.metrics import Metrics, RayMetrics
from blockpruner.cluster.nodes import (
    Needs,
    Node,
    check_feasible,
    check_number,
    choose_kind,
    describe,
    this_machine,
)
from blockpruner.cluster.options import Replicas
from blockpruner.cluster.preflight import check, check_one_kind, device_bytes, hardware
from blockpruner.cluster.session import demand, ray_session
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import resolve_device
from blockpruner.engine.scoring.replica import ReplicaSpec
from blockpruner.engine.scoring.scorer import LocalScorer, Scorer
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import GIB

PROCESS_BYTES = 2**29
"""Host memory of a replica besides the model and its computation: Python, torch and transformers."""
START_S = 120.0
"""Enough seconds for a replica with a place to start its process, which imports torch and transformers."""
Say = Callable[[str], None]


class Assignment(Protocol):
    """The work that replicas are opened for."""

    @property
    def model(self) -> ModelSource: ...

    @property
    def device(self) -> str:
        """cpu or cuda."""

    @property
    def threads(self) -> int:
        """CPU threads per replica."""

    @property
    def num_gpus(self) -> int:
        """Minimum number of GPUs per replica; 0 on CPUs."""

    @property
    def data(self) -> Any:
        """The data passed to each replica when it is opened."""

    @property
    def result_bytes(self) -> int:
        """Size of the largest result of a unit; 0 if it is small."""

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[ReplicaSpec, Needs]:
        """Return the specification and the needs of each replica, given the memory of a device."""


@dataclass(frozen=True)
class Opened:
    scorer: Scorer
    device_bytes: int
    """Memory of the smallest device."""
    metrics: Metrics


@contextmanager
def open_scorer(wishes: Replicas, assignment: Assignment, say: Say, run: str) -> Iterator[Opened]:
    """Open a scorer whose replicas load in the background. With wishes.address, Ray must have joined the cluster.

    run: name of the run for dashboards.
    """
    with ExitStack() as stack:
        open_on = _on_this_machine if wishes.address is None else _on_cluster
        yield open_on(wishes, assignment, stack, say, run)


def choose_device(wishes: Replicas, device: str, say: Say) -> str:
    """Resolve `auto` to cpu or cuda, for this machine or for the cluster that Ray has joined."""
    if wishes.address is None:
        return str(resolve_device(device))
    if device != "auto":
        return device
    from blockpruner.cluster.fleet import cluster_nodes  # only now: Ray has been joined

    if any(node.num_gpus for node in cluster_nodes()):
        return "cuda"
    say("note: no node of the cluster has a GPU now, so CPUs are used; set `device=cuda` to wait for GPU nodes")
    return "cpu"


def _on_this_machine(wishes: Replicas, assignment: Assignment, stack: ExitStack, say: Say, run: str) -> Opened:
    device = assignment.device
    here = this_machine(device)
    check_one_kind({here.name: hardware(device)}, allow_mixed=wishes.allow_mixed)
    memory_bytes = device_bytes(device) or here.memory_bytes
    spec, needs = assignment.settle(memory_bytes, here.num_gpus)
    check_feasible([here], replace(needs, num_cpus=1, memory_bytes=0))
    fit = max(1, needs.fit(here))
    most = wishes.replicas or (1 if wishes.no_ray else fit)
    if device == "cuda" and most > fit:
        raise UserError(
            f"expected at most {fit} replicas of {needs} each, since {describe([here])}, got {most}; use fewer "
            f"`replicas`."
        )
    if device == "cpu":
        check_number(most, needs, here)
    reason = "as asked" if wishes.replicas else "`no_ray`: in this process" if wishes.no_ray else _limit(needs, here)
    shared = f"; only {fit} fit the CPUs, so they will share cores" if most > fit else ""
    say(f"{most} {'replica' if most == 1 else 'replicas'} of {needs} ({reason}{shared})")
    if most == 1:
        return Opened(LocalScorer(spec.open(assignment.data)), memory_bytes, Metrics())
    stack.enter_context(
        ray_session(None, most * assignment.threads, here.num_gpus, 2 * most * assignment.result_bytes, say)
    )
    from blockpruner.cluster.dispatch import Dispatcher
    from blockpruner.cluster.fleet import RayFleet  # only now: ray_session has set the environment

    fleet = RayFleet(spec, assignment.data, needs, expected=None)
    metrics = RayMetrics(run)
    waits = {"task_timeout_s": wishes.task_timeout_s, "patience_s": START_S}
    needs = replace(needs, memory_bytes=0)  # `fit` above already accounts for memory
    scorer = stack.enter_context(Dispatcher(fleet, needs, most, say, metrics=metrics, **waits))
    return Opened(scorer, memory_bytes, metrics)


def _on_cluster(wishes: Replicas, assignment: Assignment, stack: ExitStack, say: Say, run: str) -> Opened:
    from blockpruner.cluster.dispatch import Dispatcher
    from blockpruner.cluster.fleet import RayFleet, cluster_nodes, survey_nodes  # only now: Ray has been joined

    least = Needs(assignment.threads, assignment.num_gpus)
    stack.enter_context(demand(least.num_cpus, least.num_gpus, wishes.replicas or 1))
    nodes = _wait_for_nodes(cluster_nodes, least, wishes.resource_timeout_s, say)
    kind = choose_kind(nodes, least, say) if least.num_gpus and not wishes.allow_mixed else None
    if kind is not None and any(node.kind != kind for node in nodes):  # else new machines would be of any kind
        nodes = [node for node in nodes if node.kind == kind]
        stack.enter_context(demand(least.num_cpus, least.num_gpus, wishes.replicas or 1, kind))
    surveys = survey_nodes(nodes, assignment.model, assignment.device)
    check(surveys, allow_mixed=wishes.allow_mixed)
    gpu_sizes = [found.device_bytes for found in surveys.values() if found.device_bytes is not None]
    memory_bytes = min(gpu_sizes or [node.memory_bytes for node in nodes])
    spec, needs = assignment.settle(memory_bytes, max(node.num_gpus for node in nodes))
    check_feasible(nodes, needs)
    fit = sum(needs.fit(node) for node in nodes)
    number = f"{fit}" if wishes.replicas is None else f"{min(fit, wishes.replicas)} of {wishes.replicas}"
    say(f"replicas of {needs}: {number} have a place, nodes: {len(nodes)}; nodes that join later will be used, too")
    expected = next(iter(surveys.values()))
    fleet = RayFleet(spec, assignment.data, needs, expected, allow_mixed=wishes.allow_mixed, kind=kind)
    metrics = RayMetrics(run)
    waits = {"task_timeout_s": wishes.task_timeout_s, "patience_s": max(START_S, wishes.resource_timeout_s)}
    scorer = stack.enter_context(Dispatcher(fleet, needs, wishes.replicas, say, metrics=metrics, **waits))
    return Opened(scorer, memory_bytes, metrics)


def _wait_for_nodes(find: Callable[[], Sequence[Node]], needs: Needs, patience_s: float, say: Say) -> list[Node]:
    """Wait until a node can hold a replica, and return all such nodes."""
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
                f"{describe(nodes)}. Add nodes, or raise `resource_timeout_s` if nodes are still starting."
            )
        if waited_s >= next_word_s:
            say(f"waiting for a node with {needs} (now {describe(nodes)}); giving up in {patience_s - waited_s:.0f} s")
            next_word_s = max(10.0, 2 * waited_s)
        time.sleep(1.0)


def _limit(needs: Needs, node: Node) -> str:
    """Return the reason why there are no more replicas."""
    if needs.num_gpus:
        return "all GPUs used"
    if replace(needs, memory_bytes=0).fit(node) > needs.fit(node):
        return f"limited by {node.memory_bytes / GIB:.1f} GiB of free memory"
    return "all CPUs used"
