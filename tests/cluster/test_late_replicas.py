"""Replicas that wait for a busy node or start slowly: no run waits for them where another replica can work."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import FOREVER, SimulatedFleet
from blockpruner.cluster.dispatch import Dispatcher
from blockpruner.cluster.nodes import Node
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.scoring.scorer import UnitResult
from tests.cluster.test_dispatch import ONE_GPU, UNITS, fleet, node, run
from tests.cluster.test_homes import Homed


def test_while_a_replica_waits_for_a_busy_node_another_one_starts_elsewhere() -> None:
    on = fleet()
    on.busy_until["a"] = FOREVER
    results, said = run(on, most=1)
    assert {result.replica for result in results.values()} == {"replica-1"}
    assert "replica-1 starts on b, which has a free place; replica-0 still waits for a" in said
    assert "replica-0 is not needed: it still waits for a, and others run" in said


@pytest.mark.parametrize("start_s", [20.0, 45.0, 100.0])
def test_a_slow_start_is_never_interrupted(start_s: float) -> None:
    on = fleet(node("a"), node("b"), node("c"), start_s=start_s, end_s=1000.0)
    results, _ = run(on, most=1, patience_s=120.0)
    assert {result.replica for result in results.values()} == {"replica-0"}
    assert min(result.start_s for result in results.values()) == start_s


def test_no_more_replicas_run_than_were_asked_for_though_more_were_started() -> None:
    on = fleet(node("a", 2), node("b", 2), node("c", 2), start_s=30.0)
    with Dispatcher(on, ONE_GPU, 2, lambda text: None) as dispatcher:
        results = list(dispatcher.run(UNITS))
        assert sum(replica.is_alive for replica in on.replicas) == dispatcher.num_replicas == 2
        assert dispatcher.num_lost == 0
    assert len({result.replica for result in results if isinstance(result, UnitResult)}) == 2
    assert {replica.node.name for replica in on.replicas} == {"a", "b", "c"}


def test_a_replica_that_starts_slowly_gets_no_company_on_its_node() -> None:
    on = fleet(node("a", num_gpus=4), start_s=45.0)
    run(on, most=2)
    assert len(on.replicas) == 2


def test_a_replica_that_cannot_start_again_on_its_node_is_replaced_on_another() -> None:
    on = fleet(load_s=1.0)
    on.at(3.5, lambda: on.lose(on.alive[0], noticed_s=FOREVER))
    results, _ = run(on, most=1)
    assert {result.replica for result in results.values() if result.start_s > 4} == {"replica-1"}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_bad=st.integers(0, 3), most=st.none() | st.integers(1, 3))
def test_as_long_as_one_node_has_room_every_run_ends(data: st.DataObject, num_bad: int, most: int | None) -> None:
    """Nothing happens to one node. Others are lost, noticed late or never, are busy for long, lose replicas."""
    bad = [node(f"bad{index}", data.draw(st.integers(1, 3))) for index in range(num_bad)]
    start_s = data.draw(st.sampled_from([0.0, 3.0, 20.0, 45.0]))
    load_s = data.draw(st.sampled_from([0.0, 5.0]))
    nodes: list[Node] = [*bad, node("good", data.draw(st.integers(1, 2)))]
    on = SimulatedFleet(
        nodes,
        lambda unit: unit.flops / 1e12,
        sums=lambda unit: unit,  # type: ignore[arg-type, return-value]
        start_s=start_s,
        load_s=load_s,
        end_s=5000.0,
    )
    for one in bad:
        on.busy_until[one.id] = data.draw(st.sampled_from([0.0, 0.0, 0.0, 30.0, FOREVER]))
        for time_s in data.draw(st.lists(st.floats(0, 60), max_size=2)):
            memory = data.draw(st.booleans())
            name = f"{one.name}#{data.draw(st.integers(0, 3))}"
            on.at(time_s, lambda name=name, memory=memory: on.kill(name, out_of_memory=memory))  # type: ignore[misc]
        if data.draw(st.booleans()):
            late_s = data.draw(st.sampled_from([0.0, 9.0, FOREVER, FOREVER]))
            on.at(data.draw(st.floats(0, 60)), lambda one=one, late_s=late_s: on.lose(one, noticed_s=late_s))  # type: ignore[misc]
    has_homes = data.draw(st.booleans())
    num_units = data.draw(st.integers(5, 40))
    with Dispatcher(on, ONE_GPU, most, lambda text: None, patience_s=300.0) as dispatcher:
        try:
            for turn in range(3):
                units = [Homed(n % 5 if has_homes else None, 100 * turn + n) for n in range(num_units)]
                results = list(dispatcher.run(units))  # type: ignore[type-var]
                assert sorted(result.unit.round for result in results) == [unit.round for unit in units]
                assert all(result.value is result.unit for result in results)  # type: ignore[union-attr]
        except SearchFailed:
            pass  # killed three times in a row, or without memory for a single replica
    assert not any(replica.is_alive for replica in on.replicas)
