"""Where replicas go, from what nodes have: plain values, no cluster."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.cluster.nodes import Needs, Node, check_feasible, default_threads, free_places, local_cpus
from blockpruner.engine.errors import UserError
from blockpruner.searching.config import SearchConfig


def config(**options: object) -> SearchConfig:
    return SearchConfig(model="any", num_remove=1, **options)  # type: ignore[arg-type]


def node(name: str, num_cpus: int, num_gpus: int = 0, memory_bytes: int = 0) -> Node:
    return Node(name, name, num_cpus, num_gpus, memory_bytes)


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


def test_threads_do_not_depend_on_the_number_of_replicas() -> None:
    assert {default_threads(config(replicas=number)) for number in (None, 1, 2, 64)} == {1}
    assert default_threads(config(no_ray=True)) == local_cpus()
    assert default_threads(config(threads_per_replica=3)) == 3
