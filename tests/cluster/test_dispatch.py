"""The dispatcher on a simulated fleet: every fault, without waiting. Ray itself is in test_scorers and test_faults."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import FOREVER, SimulatedFleet
from blockpruner.cluster.dispatch import Dispatcher
from blockpruner.cluster.fleet_protocol import NodeUnfit
from blockpruner.cluster.metrics import COUNTED, SHOWN, Metrics
from blockpruner.cluster.nodes import Needs, Node
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.errors import DeviceMemoryError, SearchFailed, UserError
from blockpruner.engine.scoring.scorer import OutOfMemory, UnitResult
from blockpruner.engine.work.units import KernelShape, WorkUnit

KERNEL = KernelShape(rows=1, head_tokens=1, masks=1, windows=1, threads=1)
ONE_GPU = Needs(num_cpus=1, num_gpus=1)
UNITS = [
    WorkUnit((Mask().without(block),), window, window + 1, 10**12 * (1 + index % 3), KERNEL)
    for index, block in enumerate(Granularity.MIX.candidates(3))
    for window in range(3)
]


def node(name: str, num_gpus: int = 1) -> Node:
    return Node(id=name, name=name, num_cpus=8, num_gpus=num_gpus, memory_bytes=0)


def seconds(unit: WorkUnit) -> float:
    return unit.flops / 1e12


def value(unit: WorkUnit) -> list[list[float]]:
    return [[float(hash((str(mask), unit.first)) % 1000) for mask in unit.masks]]


def fleet(*nodes: Node, cost: Callable[[WorkUnit], float] = seconds, **options: float) -> SimulatedFleet:
    return SimulatedFleet(nodes or [node("a"), node("b")], cost, sums=value, **options)


def run(on: SimulatedFleet, most: int | None = None, **options: float) -> tuple[dict[WorkUnit, UnitResult], list[str]]:
    """Results by unit, each exactly once; and what was said."""
    said: list[str] = []
    with Dispatcher(on, ONE_GPU, most, said.append, **options) as dispatcher:
        results = list(dispatcher.run(UNITS))
    assert Counter(result.unit for result in results) == Counter(UNITS)
    assert all(isinstance(result, UnitResult) and result.value == value(result.unit) for result in results)
    assert not any(replica.is_alive for replica in on.replicas)
    return {result.unit: result for result in results if isinstance(result, UnitResult)}, said


def test_all_gpus_of_all_nodes_are_used_and_kept_busy() -> None:
    on = fleet(node("a", 2), node("b", 1), node("head", 0))
    results, said = run(on)
    assert {result.replica for result in results.values()} == {"replica-0", "replica-1", "replica-2"}
    assert max(result.stop_s for result in results.values()) == pytest.approx(sum(map(seconds, UNITS)) / 3, abs=1)
    assert "replica-2 on a is ready (a#1)" in said


class Noted(Metrics):
    """Keeps what dashboards would show."""

    def __init__(self) -> None:
        self.counted = dict.fromkeys(COUNTED, 0)
        self.shown: dict[str, list[float]] = {name: [] for name in SHOWN}

    def count(self, name: str, number: int = 1) -> None:
        self.counted[name] += number

    def show(self, name: str, value: float) -> None:
        self.shown[name].append(value)


def test_units_the_queue_replicas_and_deaths_are_counted_for_dashboards() -> None:
    on, metrics = fleet(node("a", 2), node("b", 1)), Noted()
    on.at(3.0, lambda: on.kill("a#1"))
    with Dispatcher(on, ONE_GPU, None, lambda text: None, metrics=metrics) as dispatcher:
        list(dispatcher.run(UNITS))
        assert metrics.counted == {"units_done": len(UNITS), "windows_done": 0, "deaths": dispatcher.num_lost}
    assert metrics.counted["deaths"] == 1
    queue, replicas = metrics.shown["queue_length"], metrics.shown["replicas"]
    assert (queue[0], queue[-1]) == (len(UNITS), 0)
    assert (replicas[0], max(replicas)) == (0, 3)


def test_a_unit_begins_where_the_one_before_it_ended() -> None:
    results, _ = run(fleet(node("a")))
    times = sorted((result.start_s, result.stop_s) for result in results.values())
    assert all(stop_s - start_s > 0 for start_s, stop_s in times)
    assert [start_s for start_s, _ in times[1:]] == [stop_s for _, stop_s in times[:-1]]


def test_only_so_many_replicas_as_were_asked_for_spread_over_nodes() -> None:
    on = fleet(node("a", 4), node("b", 4))
    run(on, most=3)
    assert Counter(replica.node.name for replica in on.replicas) == {"a": 2, "b": 1}


def test_a_replica_killed_while_it_scores_is_replaced_twice_in_a_row() -> None:
    on = fleet(start_s=1.0, load_s=2.0)
    on.at(4.5, lambda: on.kill("a#0"))
    on.at(8.0, lambda: on.kill("a#1"))
    _, said = run(on)
    assert sum("died (killed); it is replaced; " in text for text in said) == 2


def test_a_replica_killed_while_it_loads_is_replaced() -> None:
    on = fleet(start_s=1.0, load_s=2.0)
    on.at(2.0, lambda: on.kill("a#0"))
    _, said = run(on)
    assert "replica-0 on a died (killed); it is replaced" in said
    assert "replica-0 on a is ready (a#1)" in said


def test_a_node_lost_in_mid_step_is_no_longer_used_though_the_cluster_notices_late() -> None:
    on = fleet(load_s=1.0)
    lost = on.alive[0]
    on.at(3.5, lambda: on.lose(lost, noticed_s=9.0))
    results, said = run(on)
    assert {result.replica for result in results.values() if result.start_s > 4} == {"replica-1"}
    assert any("its node a is gone" in text for text in said)


def test_a_node_that_joins_in_mid_step_is_used() -> None:
    on = fleet(node("a"))
    on.at(6.0, lambda: on.alive.append(node("late", 2)))
    results, said = run(on)
    assert {"replica-1", "replica-2"} < {result.replica for result in results.values()}
    assert "replica-1 starts on late, which has a free place" in said


def test_a_lost_node_may_come_back_under_another_id() -> None:
    on = fleet(load_s=1.0)
    on.at(3.5, lambda: on.lose(on.alive[0]))
    on.at(12.0, lambda: on.alive.append(node("a again")))
    results, _ = run(on)
    assert "replica-2" in {result.replica for result in results.values()}


def test_a_unit_that_hangs_is_given_up_and_done_elsewhere() -> None:
    hung: list[WorkUnit] = []

    def cost(unit: WorkUnit) -> float:
        if unit == UNITS[4] and not hung:
            hung.append(unit)
            return FOREVER
        return seconds(unit)

    results, said = run(fleet(cost=cost), task_timeout_s=30.0)
    assert any("no result within 30 s" in text for text in said)
    assert max(result.stop_s for result in results.values()) < 30 + sum(map(seconds, UNITS))


def test_a_unit_that_is_only_slow_is_not_given_up() -> None:
    on = fleet(cost=lambda unit: seconds(unit) * (4.5 if unit == UNITS[5] else 1))
    _, said = run(on, task_timeout_s=1.0)
    assert not any("no result" in text for text in said)


def test_a_unit_that_always_hangs_ends_the_run_and_is_named() -> None:
    on = fleet(cost=lambda unit: FOREVER if unit == UNITS[4] else seconds(unit))
    with pytest.raises(SearchFailed, match=r"windows 1\.\.1 of masks mha\.1 \.\.\. mha\.1 killed 3 .*no result"):
        run(on, task_timeout_s=5.0)
    assert not any(replica.is_alive for replica in on.replicas)


def test_a_node_without_memory_gets_one_replica_less() -> None:
    on = fleet(node("a", 2))
    on.at(2.5, lambda: on.kill("a#0", "the host ran out of memory", out_of_memory=True))
    results, said = run(on)
    assert {result.replica for result in results.values() if result.start_s > 3} == {"replica-1"}
    assert any("one replica fewer" in text for text in said)


def test_a_node_without_memory_for_a_single_replica_ends_the_run() -> None:
    on = fleet(node("a"))
    on.at(2.5, lambda: on.kill("a#0", "the host ran out of memory", out_of_memory=True))
    with pytest.raises(SearchFailed, match="the memory of a is too small for one replica"):
        run(on)


def test_a_node_on_which_replicas_always_die_is_given_up_and_the_others_go_on() -> None:
    on = fleet(load_s=5.0)
    for number in range(3):
        on.at(1.0 + number, lambda number=number: on.kill(f"a#{number}"))
    results, said = run(on)
    assert {result.replica for result in results.values()} == {"replica-1"}
    assert any(text.startswith("node a gets no more replicas: 3 replicas in a row died") for text in said)


def test_a_node_on_which_replicas_always_die_is_given_up_for_a_free_one_that_was_not_needed() -> None:
    on = fleet(load_s=5.0)
    for number in range(3):
        on.at(1.0 + number, lambda number=number: on.kill(f"a#{number}"))
    results, said = run(on, most=1)
    assert {result.replica for result in results.values()} == {"replica-1"}
    assert "replica-1 starts on b, which has a free place" in said


def test_the_only_node_on_which_replicas_always_die_ends_the_run() -> None:
    on = fleet(node("a"), load_s=5.0)
    for number in range(3):
        on.at(1.0 + number, lambda number=number: on.kill(f"a#{number}"))
    with pytest.raises(SearchFailed, match="3 replicas in a row died on a while loading"):
        run(on)


def test_a_replica_that_dies_after_a_long_load_and_starts_again_slowly_is_waited_for() -> None:
    on = fleet(node("a"), start_s=8.0, load_s=90.0, end_s=1000.0)
    on.at(85.0, lambda: on.kill("a#0"))
    _, said = run(on, patience_s=60.0)
    assert "replica-0 on a is ready (a#1)" in said


def test_replicas_that_die_whenever_their_free_memory_is_asked_for_end_the_run() -> None:
    class Dying(SimulatedFleet):
        def free_bytes(self, handle):  # type: ignore[no-untyped-def]
            self.kill(handle.name)
            return super().free_bytes(handle)

    on = Dying([node("a")], seconds, end_s=1000.0)
    with (
        pytest.raises(SearchFailed, match="3 replicas died when they were asked for their free memory"),
        Dispatcher(on, ONE_GPU, None, lambda text: None) as dispatcher,
    ):
        dispatcher.free_bytes()


def test_a_node_that_differs_is_not_used_when_others_are_there() -> None:
    class Unlike(SimulatedFleet):
        def load(self, handle):  # type: ignore[no-untyped-def]
            call = super().load(handle)
            if handle.node.name == "a":
                call.error = NodeUnfit("it differs from the others: torch is '1' there and '2' elsewhere")
            return call

    on = Unlike([node("a"), node("b")], seconds, sums=value)
    for most in (None, 1):
        results, said = run(on, most=most)
        assert {result.replica for result in results.values()} == {"replica-1"}
        assert any("torch is '1'" in text for text in said)
    with pytest.raises(NodeUnfit):
        run(Unlike([node("a")], seconds))


def test_no_place_is_said_again_and_again_and_then_ends() -> None:
    on = fleet(node("head", 0))
    said: list[str] = []
    with (
        pytest.raises(
            UserError, match=r"no resources: .*1 GPU and 1 CPU thread.* after \d+ s; no node has that much \(head"
        ),
        Dispatcher(on, ONE_GPU, None, said.append, patience_s=100.0) as dispatcher,
    ):
        list(dispatcher.run(UNITS))
    assert sum(text.startswith("waiting for resources") for text in said) == 4  # after 10, 20, 40 and 80 s


def test_a_place_that_others_hold_is_waited_for() -> None:
    on = fleet(node("a"), start_s=70.0)
    with pytest.raises(UserError, match=r"none has started after \d+ s; others may be using the nodes"):
        run(on, patience_s=60.0)
    run(fleet(node("a"), start_s=70.0), patience_s=90.0)


def test_a_long_load_is_waited_for_and_said() -> None:
    _, said = run(fleet(load_s=500.0), patience_s=60.0)
    assert "no replica is ready after 10 s: loading the model" in said


def test_a_unit_that_does_not_fit_the_memory_is_reported_and_the_others_are_done() -> None:
    class Small(SimulatedFleet):
        def score(self, handle, unit):  # type: ignore[no-untyped-def]
            call = super().score(handle, unit)
            if unit == UNITS[3]:
                call.error = DeviceMemoryError("tried to allocate 20 GiB")
            return call

    with Dispatcher(Small([node("a")], seconds), ONE_GPU, None, lambda text: None) as dispatcher:
        results = list(dispatcher.run(UNITS))
    assert [result for result in results if isinstance(result, OutOfMemory)] == [
        OutOfMemory(UNITS[3], "tried to allocate 20 GiB")
    ]
    assert len(results) == len(UNITS)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    num_faults=st.integers(0, 8),
    load_s=st.floats(0, 5),
)
def test_whatever_happens_every_unit_is_done_once_or_the_run_ends(
    data: st.DataObject, sizes: list[int], num_faults: int, load_s: float
) -> None:
    nodes = [node(f"n{index}", size) for index, size in enumerate(sizes)]
    on = fleet(*nodes, load_s=load_s)
    for index in range(num_faults):
        time_s = data.draw(st.floats(0, 40))
        kind = data.draw(st.sampled_from(["kill", "lose", "join", "memory"]))
        victim = data.draw(st.sampled_from(nodes))
        name = f"{victim.name}#{data.draw(st.integers(0, 5))}"
        if kind == "kill":
            on.at(time_s, lambda name=name: on.kill(name))
        elif kind == "memory":
            on.at(time_s, lambda name=name: on.kill(name, out_of_memory=True))
        elif kind == "join":
            on.at(time_s, lambda index=index: on.alive.append(node(f"late{index}")))
        else:
            on.at(time_s, lambda victim=victim: on.lose(victim) if victim in on.alive else None)
    try:
        run(on)
    except (SearchFailed, UserError):
        assert not any(replica.is_alive for replica in on.replicas)


def test_a_node_that_joins_but_cannot_load_does_not_end_the_run() -> None:
    class Broken(SimulatedFleet):
        def load(self, handle):  # type: ignore[no-untyped-def]
            call = super().load(handle)
            if handle.node.name == "late":
                call.error = RuntimeError("No module named 'cluster'")
            return call

    on = Broken([node("a")], seconds, sums=value)
    on.at(6.0, lambda: on.alive.append(node("late")))
    results, said = run(on)
    assert {result.replica for result in results.values()} == {"replica-0"}
    assert "node late gets no more replicas: No module named 'cluster'" in said
    with pytest.raises(RuntimeError, match="No module"):
        run(Broken([node("late")], seconds))


def test_a_load_that_hangs_is_given_up() -> None:
    hung: list[str] = []

    class Hanging(SimulatedFleet):
        def load(self, handle):  # type: ignore[no-untyped-def]
            call = super().load(handle)
            if not hung:
                hung.append(handle.name)
                call.done_s = FOREVER
            return call

    _, said = run(Hanging([node("a")], seconds, sums=value))
    assert any("no result within 3600 s" in text for text in said)


def test_loads_that_always_hang_end_the_run() -> None:
    with pytest.raises(SearchFailed, match=r"3 replicas in a row died on a while loading.*no result within 3600 s"):
        run(fleet(node("a"), load_s=FOREVER, end_s=1e5))


def test_a_node_that_holds_fewer_models_than_it_has_gpus_keeps_those_that_fit() -> None:
    on = fleet(node("a", 8), load_s=10.0)
    for number in (2, 4, 6):
        on.at(5.0, lambda number=number: on.kill(f"a#{number}", "memory", out_of_memory=True))
    results, _ = run(on)
    assert {result.replica for result in results.values()} == {f"replica-{number}" for number in (0, 1, 3, 5, 7)}
