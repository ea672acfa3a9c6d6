"""What the machine or cluster has -> how many replicas, and with what each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.config import SearchConfig
from engine.errors import UserError


@dataclass(frozen=True)
class NodeResources:
    num_cpus: int
    num_gpus: int


@dataclass(frozen=True)
class Placement:
    num_replicas: int
    threads: int
    """CPU threads of a replica."""
    num_gpus: int
    """GPUs of a replica."""
    reason: str


def local_cpus() -> int:
    """CPUs that this process may use: in containers the machine has more."""
    return len(os.sched_getaffinity(0))


def this_machine(device: str) -> NodeResources:
    return NodeResources(local_cpus(), torch.cuda.device_count() if device == "cuda" else 0)


def cluster_nodes() -> list[NodeResources]:
    """What each living node of the joined cluster has."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeResources(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive]


def place(config: SearchConfig, device: str, nodes: Sequence[NodeResources], threads: int) -> Placement:
    """Resolve the number of replicas, per node, since a replica does not span nodes.

    threads: of one replica, already resolved (a resumed run keeps its own).
    """
    if device == "cuda":
        each = config.gpus_per_replica or 1
        most = sum(node.num_gpus // each for node in nodes)
        asked = config.replicas or max(1, most)
        if asked > most:
            raise UserError(
                f"expected at most {most} replicas of {each} GPUs each, since {len(nodes)} nodes have "
                f"{sum(node.num_gpus for node in nodes)} GPUs, got {asked}."
            )
        return Placement(asked, threads, each, "as asked" if config.replicas else f"{each} GPU each, all GPUs used")
    if config.gpus_per_replica is not None:
        raise UserError(
            f"expected no --gpus-per-replica on a CPU (no GPU was found, or --device cpu was given), got "
            f"{config.gpus_per_replica}."
        )
    most = sum(node.num_cpus // threads for node in nodes)
    if config.address is not None and (config.replicas or 1) > most:
        raise UserError(
            f"expected at most {most} replicas of {threads} CPU threads each on {len(nodes)} nodes of the cluster, got "
            f"{config.replicas or 1}; use fewer --replicas or --threads-per-replica."
        )
    if config.no_ray:
        return Placement(1, threads, 0, "--no-ray: in this process")
    if config.replicas is None:
        return Placement(max(1, most), threads, 0, f"{threads} CPU threads each, all CPUs used")
    if config.replicas > max(1, most):
        return Placement(
            config.replicas, threads, 0, f"as asked, though the CPUs hold {max(1, most)}: they will share cores"
        )
    return Placement(config.replicas, threads, 0, "as asked")


def default_threads(config: SearchConfig) -> int:
    """CPU threads of a replica when nothing was asked. Never from the number of replicas: threads may change bits.

    Two replicas of one thread beat one of two, so it is one, but for --no-ray, where one process must use all CPUs.
    """
    if config.threads_per_replica is not None:
        return config.threads_per_replica
    return local_cpus() if config.no_ray else 1
