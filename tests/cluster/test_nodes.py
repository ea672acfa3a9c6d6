"""Where replicas go, from what nodes have: plain values, no cluster."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.cluster.nodes import Needs, Node, check_feasible, choose_kind, default_threads, free_places, local_cpus
from blockpruner.engine.errors import UserError
from blockpruner.searching.config import SearchConfig


def config(**options: object) -> SearchConfig:
    return SearchConfig(model="any", num_remove=1, **options)  # type: ignore[arg-type]


def node(name: str, num_cpus: int, num_gpus: int = 0, memory_bytes: int = 0, kind: str = "") -> Node:
    return Node(name, name, num_cpus, num_gpus, memory_bytes, kind)


@pytest.mark.parametrize(
    ("needs", "fit"),
    [
        (Needs(1, 0), 8),
        (Needs(3, 0), 2),
        (Needs(1, 1), 3),
        (Needs(1, 2), 1),
        (Needs(4, 1), 2),
        (Needs(1, 4), 0),
        (Needs(1, 0, memory_bytes=30), 3),
        (Needs(1, 0, memory_bytes=101), 0),
    ],
)
def test_a_node_holds_what_its_scarcest_resource_allows(needs: Needs, fit: int) -> None:
    assert needs.fit(node("a", 8, 3, 100)) == fit


def test_replicas_do_not_span_nodes() -> None:
    nodes = [node("a", 8, 3), node("b", 8, 3)]
    assert [place.name for place in free_places(nodes, Needs(1, 2), Counter())] == ["a", "b"]


@given(
    gpus=st.lists(st.integers(0, 5), max_size=5),
    taken=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    each=st.integers(1, 3),
)
def test_free_places_are_all_those_that_are_not_taken(gpus: list[int], taken: list[int], each: int) -> None:
    nodes = [node(str(index), 64, number) for index, number in enumerate(gpus)]
    occupied = Counter({str(index): number for index, number in enumerate(taken)})
    places = Counter(place.name for place in free_places(nodes, Needs(1, each), occupied))
    for index, number in enumerate(gpus):
        assert places[str(index)] == max(0, number // each - taken[index])


def test_more_gpus_a_replica_than_any_node_has_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"`gpus_per_replica` of at most 3.* got 4"):
        check_feasible([node("a", 8, 2), node("b", 8, 3), node("head", 8)], Needs(1, 4))


def test_more_threads_than_any_node_has_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"`threads_per_replica` of at most 32.* got 64"):
        check_feasible([node("a", 32), node("b", 16)], Needs(64, 0))


def test_resources_that_may_still_come_are_not_refused() -> None:
    check_feasible([], Needs(1, 4))
    check_feasible([node("head", 0)], Needs(1, 1))


@pytest.mark.parametrize(
    ("gpus", "each", "chosen", "told"),
    [
        ([("T4", 4)], 1, "T4", None),
        ([("T4", 4), ("A100", 2), ("A100", 3)], 1, "A100", "A100 are used, which hold 5 replicas (others: T4 4)"),
        ([("T4", 4), ("A100", 3), ("A100", 3)], 2, "A100", "A100 are used, which hold 2 replicas (others: T4 2)"),
        ([("T4", 4), ("", 8)], 4, "", "unknown are used, which hold 2 replicas (others: T4 1)"),
    ],
)
def test_the_kind_of_gpu_that_gives_the_most_replicas_is_used_in_any_order_of_the_nodes(
    gpus: list[tuple[str, int]], each: int, chosen: str, told: str | None
) -> None:
    nodes = [node(str(index), 64, number, kind=kind) for index, (kind, number) in enumerate(gpus)]
    said: list[str] = []
    for order in itertools.permutations(nodes):
        assert choose_kind(order, Needs(1, each), said.append) == chosen
    assert all(told is not None and told in text for text in said)
    assert bool(said) == (told is not None)


def test_threads_do_not_depend_on_the_number_of_replicas() -> None:
    assert {default_threads(config(replicas=number)) for number in (None, 1, 2, 64)} == {1}
    assert default_threads(config(no_ray=True)) == local_cpus()
    assert default_threads(config(threads_per_replica=3)) == 3
