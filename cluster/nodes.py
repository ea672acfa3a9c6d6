"""Decides where replicas go, from what nodes have and what a replica needs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from blockpruner.cluster.options import LocalReplicas
from blockpruner.engine.errors import UserError
from blockpruner.engine.work.memory import GIB

REPLICAS_PER_CPU = 2
"""More replicas on a CPU would only wait for each other, and start for minutes."""


@dataclass(frozen=True)
class Node:
    """A machine."""

    id: str
    name: str
    """Its address, for messages."""
    num_cpus: int
    num_gpus: int
    memory_bytes: int
    """Host memory."""
    kind: str = ""
    """Kind of its GPUs as Ray names it, A100 for example. Empty without GPUs, or if Ray does not know it."""


@dataclass(frozen=True)
class Needs:
    """Resources that one replica takes on its node. A replica never spans nodes."""

    num_cpus: int
    """CPU threads."""
    num_gpus: int
    memory_bytes: int = 0
    """Host memory that a replica may come to use; 0 if the user set the number of replicas, which it does not limit."""
    least_bytes: int = 0
    """Host memory that a replica on CPUs takes in any case: more replicas than fit with it would end the machine."""

    def fit(self, node: Node) -> int:
        """Return the number of replicas that fit a node."""
        limits = [node.num_cpus // self.num_cpus]
        if self.num_gpus:
            limits.append(node.num_gpus // self.num_gpus)
        if self.memory_bytes:
            limits.append(node.memory_bytes // self.memory_bytes)
        return min(limits)

    def __str__(self) -> str:
        parts = [f"{self.num_cpus} CPU thread{'s' * (self.num_cpus > 1)}"]
        if self.num_gpus:
            parts.insert(0, f"{self.num_gpus} GPU{'s' * (self.num_gpus > 1)}")
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / GIB:.1f} GiB")
        return " and ".join(parts)


def local_cpus() -> int:
    """Return the number of CPUs that this process may use. In a container the machine can have more."""
    return len(os.sched_getaffinity(0))


def this_machine(device: str) -> Node:
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    return Node("local", "this machine", local_cpus(), num_gpus, psutil.virtual_memory().available)


def free_places(nodes: Sequence[Node], needs: Needs, taken: Counter[str]) -> list[Node]:
    """Return one node for each further replica that fits. Nodes take turns, so that the replicas are spread evenly.

    taken: number of places on each node that are not free.
    """
    ordered = sorted(nodes, key=lambda node: (node.name, node.id))
    rounds = max((needs.fit(node) for node in nodes), default=0)
    return [node for number in range(rounds) for node in ordered if taken[node.id] <= number < needs.fit(node)]


def choose_kind(nodes: Sequence[Node], needs: Needs, say: Callable[[str], None]) -> str:
    """Return the kind of GPU that gives the most replicas; of several such kinds, the first by name."""
    fit: Counter[str] = Counter()
    for node in sorted(nodes, key=lambda node: node.kind):
        fit[node.kind] += needs.fit(node)
    (chosen, most), *others = fit.most_common()  # equal counts stay in the order of the names
    if others:
        listed = ", ".join(f"{kind or 'unknown'} {number}" for kind, number in others)
        say(
            f"note: only nodes with GPUs of kind {chosen or 'unknown'} are used, which hold {most} replicas (others: "
            f"{listed}); scores could depend on the kind, so `allow_mixed` must permit more than one"
        )
    return chosen


def check_number(asked: int, needs: Needs, node: Node) -> None:
    """Raise UserError if a machine without GPUs cannot hold as many replicas as were asked for. One may always try."""
    most = REPLICAS_PER_CPU * node.num_cpus
    if needs.least_bytes:
        most = min(most, max(1, node.memory_bytes // needs.least_bytes))
    if asked > most:
        raise UserError(
            f"expected at most {most} `replicas`, got {asked}; {describe([node])}, where each takes at least "
            f"{needs.least_bytes / GIB:.1f} GiB and at most {REPLICAS_PER_CPU} share a CPU."
        )


def describe(nodes: Sequence[Node]) -> str:
    return (
        "; ".join(
            f"{node.name}: {node.num_cpus} CPUs, {node.num_gpus} GPUs, {node.memory_bytes / GIB:.1f} GiB"
            for node in nodes
        )
        or "no node"
    )


def check_feasible(nodes: Sequence[Node], needs: Needs) -> None:
    """Raise UserError if every node with the right kind of device is too small, so that waiting would not help."""
    if needs.num_gpus:
        most = max((node.num_gpus for node in nodes), default=0)
        if 0 < most < needs.num_gpus:
            raise UserError(
                f"expected `gpus_per_replica` of at most {most}, the GPUs of the largest node ({describe(nodes)}), got "
                f"{needs.num_gpus}; a replica does not span nodes."
            )
    largest_bytes = max((node.memory_bytes for node in nodes), default=0)
    if 0 < largest_bytes < needs.memory_bytes:
        raise UserError(
            f"expected {needs.memory_bytes / GIB:.1f} GiB of memory for a replica on one node, got "
            f"{describe(nodes)}; use `replicas=1` to try anyway, or, in a search, `placement=streamed`."
        )
    most = max((node.num_cpus for node in nodes if node.num_gpus >= needs.num_gpus), default=0)
    if 0 < most < needs.num_cpus:
        raise UserError(
            f"expected `threads_per_replica` of at most {most}, the CPUs of the largest node ({describe(nodes)}), got "
            f"{needs.num_cpus}."
        )


def default_threads(wishes: LocalReplicas) -> int:
    """Return the CPU threads of a replica: the configured number, else 1, or all CPUs with `no_ray`.

    The default is 1 because two replicas with one thread are faster than one replica with two. It never depends on the
    number of replicas, because the number of threads can change scores.
    """
    if wishes.threads_per_replica is not None:
        return wishes.threads_per_replica
    return local_cpus() if wishes.no_ray else 1
