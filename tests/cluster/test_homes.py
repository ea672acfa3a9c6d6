"""Homes: units stay at the replica that keeps something for them, but no unit waits for one that cannot work."""

from collections import Counter
from dataclasses import dataclass

from benchmarks.simulation import FOREVER, SimulatedFleet
from blockpruner.cluster.dispatch import Dispatcher
from blockpruner.cluster.nodes import Node
from tests.cluster.test_dispatch import ONE_GPU, node, seconds


@dataclass(frozen=True)
class Homed:
    """A unit of one of some parts, in one of the rounds that follow each other."""

    home: int | None
    round: int
    flops: int = 10**12


def rounds(on: SimulatedFleet, num_homes: int, num_rounds: int = 6) -> list[dict[int | None, str]]:
    """For each round, the replica that ran each home."""
    found = []
    with Dispatcher(on, ONE_GPU, None, lambda text: None) as dispatcher:
        for number in range(num_rounds):
            units = [Homed(home, number) for home in range(num_homes)]
            results = list(dispatcher.run(units))
            assert Counter(result.unit for result in results) == Counter(units)
            found.append({result.unit.home: result.replica for result in results})  # type: ignore[union-attr]
    return found


def homed_fleet(*nodes: Node, **options: float) -> SimulatedFleet:
    return SimulatedFleet(nodes or [node("a"), node("b")], seconds, sums=lambda unit: None, end_s=5000.0, **options)  # type: ignore[arg-type]


def test_units_stay_at_the_replica_that_keeps_something_for_them() -> None:
    found = rounds(homed_fleet(), num_homes=4)
    assert all(one == found[1] for one in found[1:])
    assert Counter(found[-1].values()) == {"replica-0": 2, "replica-1": 2}


def test_a_replica_that_came_late_takes_over_homes_until_all_have_as_many() -> None:
    on = homed_fleet(node("a"))
    on.at(10.0, lambda: on.alive.append(node("late")))
    found = rounds(on, num_homes=6, num_rounds=12)
    assert set(found[0].values()) == {"replica-0"}
    assert Counter(found[-1].values()) == {"replica-0": 3, "replica-1": 3}
    assert found[-1] == found[-2]


def test_the_homes_of_a_lost_replica_go_to_others() -> None:
    on = homed_fleet(load_s=1.0)
    on.at(8.0, lambda: on.lose(on.alive[0]))
    assert set(rounds(on, num_homes=4, num_rounds=12)[-1].values()) == {"replica-1"}


def test_the_homes_of_a_replica_that_cannot_start_again_go_to_others() -> None:
    on = homed_fleet(load_s=1.0)
    on.at(8.0, lambda: on.lose(on.alive[0], noticed_s=FOREVER))
    assert set(rounds(on, num_homes=4, num_rounds=12)[-1].values()) == {"replica-1"}


def test_a_replica_that_is_back_while_the_others_have_homes_of_their_own_keeps_its_homes() -> None:
    on = homed_fleet(start_s=1.0, load_s=0.2)
    on.at(3.5, lambda: on.kill("b#0"))  # back at 4.7; until 5.2 the other replica has units of its own
    found = rounds(on, num_homes=4)
    assert all(one == found[0] for one in found[1:])
    assert any(replica.name == "b#1" for replica in on.replicas)


def test_no_home_moves_while_a_replica_starts_for_the_first_time() -> None:
    on = homed_fleet(node("a"), node("b"), node("c"))
    on.busy_until["c"] = 20.0
    found = rounds(on, num_homes=4, num_rounds=8)
    assert all(one == found[1] for one in found[1:])
    assert Counter(found[-1].values()) == {"replica-0": 2, "replica-1": 2}
