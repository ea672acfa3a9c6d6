"""Replicas for some work: in this process where one is enough, else Ray actors, here or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from blockpruner.cluster.nodes import Needs, Node, Wishes, check_feasible, describe, local_cpus, this_machine
from blockpruner.cluster.preflight import check, check_one_kind, device_bytes, hardware
from blockpruner.cluster.session import demand, ray_session
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import ModelSource, resolve_device
from blockpruner.engine.scoring.scoring import LocalScorer, Scorer, WorkerSpec
from blockpruner.engine.work.memory import GIB

PROCESS_BYTES = 2**29
"""Of a replica beside the model and its work: Python, torch and transformers."""
START_S = 120.0
"""In which a replica's process surely starts where it has a place: it imports torch and transformers."""
Say = Callable[[str], None]


class Assignment(Protocol):
    """What replicas are for."""

    @property
    def model(self) -> ModelSource: ...

    @property
    def device(self) -> str:
        """cpu or cuda."""

    @property
    def threads(self) -> int:
        """CPU threads of a replica."""

    @property
    def data(self) -> Any:
        """What workers are opened with."""

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[WorkerSpec, Needs]:
        """What each replica holds and takes, where a device has so much memory."""


@dataclass(frozen=True)
class Opened:
    scorer: Scorer
    device_bytes: int
    """Memory of the smallest device."""


@contextmanager
def open_scorer(wishes: Wishes, assignment: Assignment, say: Say) -> Iterator[Opened]:
    """A scorer whose replicas load. With wishes.address, the cluster has been joined."""
    with ExitStack() as stack:
        open_on = _on_this_machine if wishes.address is None else _on_cluster
        yield open_on(wishes, assignment, stack, say)


def choose_device(wishes: Wishes, device: str, say: Say) -> str:
    """`auto` to cpu or cuda, here or on the cluster that was joined."""
    if wishes.address is None:
        return str(resolve_device(device))
    if device != "auto":
        return device
    from blockpruner.cluster.fleet import cluster_nodes  # only now: Ray has been joined

    if any(node.num_gpus for node in cluster_nodes()):
        return "cuda"
    say("note: no node of the cluster has a GPU now, so CPUs are used; --device cuda waits for GPU nodes")
    return "cpu"


def _on_this_machine(wishes: Wishes, assignment: Assignment, stack: ExitStack, say: Say) -> Opened:
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
            f"--replicas."
        )
    reason = "as asked" if wishes.replicas else "--no-ray: in this process" if wishes.no_ray else _limit(needs, here)
    shared = f", though the CPUs hold {fit}: they will share cores" if most > fit else ""
    say(f"{most} {'replica' if most == 1 else 'replicas'} of {needs} ({reason}{shared})")
    if most == 1:
        return Opened(LocalScorer(spec.open(assignment.data)), memory_bytes)
    stack.enter_context(ray_session(None, max(local_cpus(), most * assignment.threads), here.num_gpus))
    from blockpruner.cluster.dispatch import Dispatcher
    from blockpruner.cluster.fleet import RayFleet  # only now: ray_session has set the environment

    fleet = RayFleet(spec, assignment.data, needs, expected=None)
    waits = {"task_timeout_s": wishes.task_timeout_s, "patience_s": START_S}
    needs = replace(needs, memory_bytes=0)  # it was counted above
    scorer = stack.enter_context(Dispatcher(fleet, needs, most, say, **waits))
    return Opened(scorer, memory_bytes)


def _on_cluster(wishes: Wishes, assignment: Assignment, stack: ExitStack, say: Say) -> Opened:
    from blockpruner.cluster.dispatch import Dispatcher
    from blockpruner.cluster.fleet import RayFleet, cluster_nodes, survey_nodes  # only now: Ray has been joined

    least = Needs(assignment.threads, (wishes.gpus_per_replica or 1) if assignment.device == "cuda" else 0)
    stack.enter_context(demand(least.num_cpus, least.num_gpus, wishes.replicas or 1))
    nodes = _wait_for_nodes(cluster_nodes, least, wishes.resource_timeout_s, say)
    surveys = survey_nodes(nodes, assignment.model, assignment.device)
    check(surveys, allow_mixed=wishes.allow_mixed)
    gpu_sizes = [found.device_bytes for found in surveys.values() if found.device_bytes is not None]
    memory_bytes = min(gpu_sizes or [node.memory_bytes for node in nodes])
    spec, needs = assignment.settle(memory_bytes, max(node.num_gpus for node in nodes))
    check_feasible(nodes, needs)
    fit = sum(needs.fit(node) for node in nodes)
    number = f"{fit}" if wishes.replicas is None else f"{min(fit, wishes.replicas)} of {wishes.replicas}"
    say(f"replicas of {needs}: {number} have a place, nodes: {len(nodes)}; nodes that join later are used, too")
    fleet = RayFleet(spec, assignment.data, needs, next(iter(surveys.values())), allow_mixed=wishes.allow_mixed)
    waits = {"task_timeout_s": wishes.task_timeout_s, "patience_s": max(START_S, wishes.resource_timeout_s)}
    scorer = stack.enter_context(Dispatcher(fleet, needs, wishes.replicas, say, **waits))
    return Opened(scorer, memory_bytes)


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


def _limit(needs: Needs, node: Node) -> str:
    """Why there are not more replicas."""
    if needs.num_gpus:
        return "all GPUs used"
    if replace(needs, memory_bytes=0).fit(node) > needs.fit(node):
        return f"more do not fit {node.memory_bytes / GIB:.1f} GiB of free memory"
    return "all CPUs used"
