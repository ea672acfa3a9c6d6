"""Distributes units of work over replicas.

The longest units run first, and each replica has two units in flight. A replica that dies or hangs is replaced
(`places.py`), and its units run again. This module does not use Ray: a `Fleet` starts replicas and forwards calls, so
that tests and simulations can run the same code with their own clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from blockpruner.cluster.fleet_protocol import Fleet, ReplicaDied
from blockpruner.cluster.metrics import Metrics
from blockpruner.cluster.nodes import Needs
from blockpruner.cluster.places import MAX_DEATHS, Place, Places
from blockpruner.engine.errors import DeviceMemoryError, SearchFailed
from blockpruner.engine.scoring.scorer import OutOfMemory, UnitResult, Work, WorkT

IN_FLIGHT = 2
"""Units queued at each replica, so that the next one starts without a round trip."""
LOOK_S = 5.0
"""Seconds between two checks of the nodes while units are running."""
SLOW = 5.0
"""A unit counts as hung when it takes this many times its expected duration."""
LOAD_TIMEOUT_S = 3600.0
"""Loading counts as hung after this many seconds."""
LEAST_FLOPS_PER_S = 1e9
LEAST_FLOPS_PER_S_OF_GPU = 1e12
"""Assumed speed of a replica that has not been measured yet. Any working replica is faster."""


class Dispatcher:
    """Runs units on all replicas that fit the nodes. Leaving the context kills every replica."""

    def __init__(
        self,
        fleet: Fleet,
        needs: Needs,
        most: int | None,
        say: Callable[[str], None],
        *,
        task_timeout_s: float = 60.0,
        patience_s: float = 60.0,
        metrics: Metrics | None = None,
    ) -> None:
        """most: largest number of replicas; None for all that fit.

        task_timeout_s: give up on a unit after this time, or after SLOW times its expected duration if that is longer.
        patience_s: how long to wait while no replica has a place.
        """
        self._fleet = fleet
        self._needs = needs
        self._task_timeout_s = task_timeout_s
        self._metrics = metrics or Metrics()
        self._homes: dict[Any, str] = {}
        """The place where the units of a home run."""
        self._slowest: float | None = None
        """FLOP/s of the slowest replica."""
        self._places = Places(fleet, needs, most, say, self._metrics, patience_s=patience_s)

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in self._places:
            self._fleet.stop(place.handle)

    @property
    def num_lost(self) -> int:
        """Number of replicas lost so far, because they died or their node was lost."""
        return self._places.num_lost

    @property
    def num_replicas(self) -> int:
        """Number of replicas that have a place: they score, or will soon."""
        return max(1, sum(place.is_placed for place in self._places))

    def free_bytes(self) -> int | None:
        """Return the free device memory after loading the weights, as the first ready replica measures it."""
        queue: deque[Work] = deque()
        num_deaths = 0
        while True:
            place = next((place for place in self._places if place.starting is None), None)
            if place is None:
                self._wait(queue, Counter())
                continue
            reference = self._fleet.free_bytes(place.handle)
            try:
                if self._fleet.wait([reference], self._task_timeout_s) is None:
                    raise ReplicaDied(f"no answer within {self._task_timeout_s:.0f} s")
                return self._fleet.result(reference)
            except ReplicaDied as death:
                num_deaths += self._places.node_lives(place)
                if num_deaths == MAX_DEATHS:
                    raise SearchFailed(
                        f"{MAX_DEATHS} replicas died when they were asked for their free memory. The last error: "
                        f"{death}"
                    ) from death
                self._replace(place, queue, Counter(), death)

    def run(self, units: Sequence[WorkT]) -> Iterator[UnitResult[WorkT] | OutOfMemory[WorkT]]:
        """Yield results as they arrive. Raises what a unit raised, or SearchFailed if one kills MAX_DEATHS replicas."""
        queue: deque[Any] = deque(sorted(units, key=lambda unit: -unit.flops))  # stable, longest first
        deaths: Counter[Any] = Counter()
        queue.extendleft(reversed(self._places.look()))
        while queue or any(place.in_flight for place in self._places):
            self._fill(queue)
            self._metrics.show("queue_length", len(queue))
            self._metrics.show("replicas", sum(place.starting is None for place in self._places))
            done = self._wait(queue, deaths)
            if done is None:
                continue
            place, unit, reference = done
            try:
                value, seconds = self._fleet.result(reference)
            except ReplicaDied as death:
                self._replace(place, queue, deaths, death)
                continue
            except DeviceMemoryError as error:
                self._finish(place, reference)
                yield OutOfMemory(unit, str(error))
                continue
            start_s = self._finish(place, reference)
            rate = unit.flops / max(seconds, 1e-9)
            self._slowest = min(rate, self._slowest or rate)
            self._metrics.count("units_done")
            yield UnitResult(unit, value, seconds, place.name, start_s, place.since)

    def _finish(self, place: Place, reference: Any) -> float:
        """Remove a finished unit, so that the next one in flight begins. Returns when the finished unit could begin."""
        del place.in_flight[reference]
        start_s, place.since = place.since, self._fleet.now()
        return start_s

    def _wait(self, queue: deque[Work], deaths: Counter[Work]) -> tuple[Place, Any, Any] | None:
        """Wait for the next event and handle it. If a unit ended, return its place, the unit and its reference."""
        references = [reference for place in self._places for reference in place.in_flight]
        references += [place.starting for place in self._places if place.starting is not None]
        deadlines = [place.since + self._deadline_s(place) for place in self._places if place.in_flight]
        timeout_s = min([self._places.looked + LOOK_S, *deadlines]) - self._fleet.now()
        reference = self._fleet.wait(references, max(0.01, timeout_s))
        if self._fleet.now() >= self._places.looked + LOOK_S:
            queue.extendleft(reversed(self._places.look()))
        self._replace_hung(queue, deaths)
        # The place may have been dropped in the meantime.
        place = next((at for at in self._places if reference == at.starting or reference in at.in_flight), None)
        if reference is None or place is None:
            return None
        if reference in place.in_flight:
            return place, place.in_flight[reference], reference
        self._places.go_on_starting(place)
        return None

    def _fill(self, queue: deque[Work]) -> None:
        """Give units to every ready replica.

        Near the end of the queue each replica gets only one unit, so that no unit waits at a busy replica while another
        replica is idle.
        """
        for depth in range(IN_FLIGHT):
            for place in self._places:
                short = len(queue) < IN_FLIGHT * len(self._places)
                if queue and place.starting is None and len(place.in_flight) == depth and not (depth and short):
                    unit = self._take(place, queue)
                    if unit is None:
                        continue
                    if not place.in_flight:
                        place.since = self._fleet.now()
                    place.in_flight[self._fleet.score(place.handle, unit)] = unit

    def _take(self, place: Place, queue: deque[Any]) -> Any | None:
        """Take the first unit of the queue that may run at a place, or None.

        A unit stays at its home, but another place takes over a home whose place has no ready replica, since what was
        kept there is lost, or has at least two homes more. Nothing but speed depends on where a unit runs.
        """
        ready = {other.name for other in self._places if other.starting is None}

        def owner(unit: Any) -> str:
            return place.name if unit.home is None else self._homes.get(unit.home, "")

        index = next((n for n, unit in enumerate(queue) if owner(unit) == place.name), None)
        if index is None:
            index = next((n for n, unit in enumerate(queue) if owner(unit) not in ready), None)
        if index is None:
            homes = Counter(self._homes.values())
            index = next((n for n, unit in enumerate(queue) if homes[owner(unit)] > homes[place.name] + 1), None)
        if index is None:
            return None
        unit = queue[index]
        del queue[index]
        if unit.home is not None:
            self._homes[unit.home] = place.name
        return unit

    def _deadline_s(self, place: Place) -> float:
        if not place.in_flight:
            return LOAD_TIMEOUT_S
        unit = next(iter(place.in_flight.values()))
        least = LEAST_FLOPS_PER_S_OF_GPU if self._needs.num_gpus else LEAST_FLOPS_PER_S
        expected_s = SLOW * unit.flops / self._slowest if self._slowest else unit.flops / least
        return max(self._task_timeout_s, expected_s)

    def _replace_hung(self, queue: deque[Work], deaths: Counter[Work]) -> None:
        for place in list(self._places):
            is_loading = place.is_placed and place.starting is not None
            running = place.starting if is_loading else next(iter(place.in_flight), None)
            late = running is not None and self._fleet.now() - place.since > self._deadline_s(place)
            # It may have ended while this process was busy.
            if late and self._fleet.wait([running], 0) is None:
                limit = ReplicaDied(f"no result within {self._deadline_s(place):.0f} s")
                if is_loading:
                    self._places.replace_unready(place, limit)
                else:
                    self._replace(place, queue, deaths, limit)

    def _replace(self, place: Place, queue: deque[Work], deaths: Counter[Work], death: ReplicaDied) -> None:
        """Replace a replica that is dead or hangs, and put its units back at the front of the queue.

        Only the first of these units was running, so only that one can have killed the replica.
        """
        lost = place.take_back()
        queue.extendleft(reversed(lost))
        if lost and self._places.node_lives(place):
            deaths[lost[0]] += 1
            if deaths[lost[0]] >= MAX_DEATHS:
                raise SearchFailed(
                    f"{lost[0]} killed {MAX_DEATHS} replicas; is there enough memory? The last error: {death}"
                )
        self._places.replace(place, death, lost)
