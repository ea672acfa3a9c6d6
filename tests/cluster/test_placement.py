"""How many replicas fit, from what nodes have: plain values, no cluster."""

import pytest

from cluster.config import SearchConfig
from cluster.placement import NodeResources, default_threads, local_cpus, place
from engine.errors import UserError


def config(**options: object) -> SearchConfig:
    return SearchConfig(model="any", num_remove=1, **options)  # type: ignore[arg-type]


def test_all_gpus_of_all_nodes_are_used() -> None:
    placement = place(config(), "cuda", [NodeResources(8, 2), NodeResources(8, 3), NodeResources(4, 0)], threads=1)
    assert (placement.num_replicas, placement.num_gpus) == (5, 1)


def test_more_replicas_than_gpus_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"at most 2 replicas.* got 3"):
        place(config(replicas=3), "cuda", [NodeResources(8, 2)], threads=1)


def test_cpu_replicas_fill_each_node_by_their_threads() -> None:
    nodes = [NodeResources(3, 0), NodeResources(3, 0)]
    assert place(config(), "cpu", nodes, threads=2).num_replicas == 2


def test_more_cpu_replicas_than_cores_are_possible_and_this_is_said() -> None:
    placement = place(config(replicas=4), "cpu", [NodeResources(2, 0)], threads=1)
    assert placement.num_replicas == 4
    assert "share cores" in placement.reason


def test_a_cluster_that_cannot_hold_the_replicas_is_refused_at_once() -> None:
    nodes = [NodeResources(32, 0), NodeResources(32, 0)]
    with pytest.raises(UserError, match=r"at most 0 replicas of 64 CPU threads"):
        place(config(address="auto"), "cpu", nodes, threads=64)
    with pytest.raises(UserError, match=r"at most 64 replicas.* got 65"):
        place(config(address="auto", replicas=65), "cpu", nodes, threads=1)


def test_threads_do_not_depend_on_the_number_of_replicas() -> None:
    assert {default_threads(config(replicas=number)) for number in (None, 1, 2, 64)} == {1}
    assert default_threads(config(no_ray=True)) == local_cpus()
    assert default_threads(config(threads_per_replica=3)) == 3
