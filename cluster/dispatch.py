"""Distributes units of work over replicas.

The longest units run first, and each replica has two units in flight. A replica that dies or hangs is replaced, and its
units run again. This module does not use Ray: a `Fleet` starts replicas and forwards calls, so that tests and
simulations can run the same code with their own clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from blockpruner.cluster.metrics import Metrics
from blockpruner.cluster.nodes import Needs, Node, describe, free_places
from blockpruner.engine.errors import DeviceMemoryError, SearchFailed, UserError, first_line
from blockpruner.engine.scoring.scorer import OutOfMemory, UnitResult, Work, WorkT

IN_FLIGHT = 2
"""Units queued at each replica, so that the next one starts without a round trip."""
MAX_DEATHS = 3
"""Limit on replicas killed by one unit, and on consecutive deaths while loading on one node."""
LOOK_S = 5.0
"""Seconds between two checks of the nodes while units are running."""
SLOW = 5.0
"""A unit counts as hung when it takes this many times its expected duration."""
FIRST_COMPLAINT_S = 10.0
MOVE_S = 10.0
"""A replica that has waited this many seconds for a busy node tries another node."""
LOAD_TIMEOUT_S = 3600.0
"""Loading counts as hung after this many seconds."""
LEAST_FLOPS_PER_S = 1e9
LEAST_FLOPS_PER_S_OF_GPU = 1e12
"""Assumed speed of a replica that has not been measured yet. Any working replica is faster."""


class ReplicaDied(Exception):
    """The process of a replica is gone, and its pending calls are lost."""

    def __init__(self, reason: str, *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory
        """The host ran out of memory, so a new replica on it would die in the same way."""


class NodeUnfit(UserError):
    """A node differs from the other nodes in a way that can change scores."""


class Fleet(Protocol):
    """Starts replicas on nodes and forwards calls to them. A reference stands for the result of a call."""

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""

    def start(self, node: Node) -> tuple[Any, Any]:
        """Return the handle of a new replica, and a reference that is done once its process runs.

        The process may have to wait for a busy node.
        """

    def load(self, handle: Any) -> Any:
        """Load the model. The result is a short description for the user."""

    def score(self, handle: Any, unit: Any) -> Any:
        """Score a unit. The result is (value, seconds)."""

    def free_bytes(self, handle: Any) -> Any: ...

    def wait(self, references: Sequence[Any], timeout_s: float) -> Any | None:
        """Return the first reference that is done, or None after `timeout_s`."""

    def result(self, reference: Any) -> Any:
        """Return the result of a reference that is done. Raises ReplicaDied, NodeUnfit, or what the call raised."""

    def stop(self, handle: Any) -> None:
        """Kill the process of a replica immediately."""

    def now(self) -> float:
        """Return the seconds since the epoch."""


@dataclass
class _Place:
    """A place for a replica on a node. The process can die and be replaced; the place and its name stay."""

    name: str
    node: Node
    handle: Any
    starting: Any
    """The reference of the start, then of the loading; None once the replica is ready."""
    is_placed: bool = False
    in_flight: dict[Any, Work] = field(default_factory=dict)
    since: float = 0.0
    """When the current activity began: the start, the loading, or the first unit in flight."""


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
        self._most = most
        self._say = say
        self._task_timeout_s = task_timeout_s
        self._patience_s = patience_s
        self._metrics = metrics or Metrics()
        self._slots: list[_Place] = []
        self._num_slots = 0
        self.num_lost = 0
        self._withdrawn: Counter[str] = Counter()
        """Number of places per node that are no longer used."""
        self._deaths_at_start: Counter[str] = Counter()
        """Consecutive deaths per node."""
        self._homes: dict[Any, str] = {}
        """The place where the units of a home run."""
        self._slowest: float | None = None
        """FLOP/s of the slowest replica."""
        self._looked = self._idle_since = fleet.now()
        self._complaint_s = FIRST_COMPLAINT_S
        self._look(deque(), is_first=True)

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            self._fleet.stop(slot.handle)

    @property
    def num_replicas(self) -> int:
        """Number of replicas that have a place: they score, or will soon."""
        return max(1, sum(slot.is_placed for slot in self._slots))

    def free_bytes(self) -> int | None:
        """Return the free device memory after loading the weights, as the first ready replica measures it."""
        queue: deque[Work] = deque()
        while True:
            slot = next((slot for slot in self._slots if slot.starting is None), None)
            if slot is None:
                self._wait(queue, Counter())
                continue
            reference = self._fleet.free_bytes(slot.handle)
            try:
                if self._fleet.wait([reference], self._task_timeout_s) is None:
                    raise ReplicaDied(f"no answer within {self._task_timeout_s:.0f} s")
                return self._fleet.result(reference)
            except ReplicaDied as death:
                self._replace(slot, queue, Counter(), death)

    def run(self, units: Sequence[WorkT]) -> Iterator[UnitResult[WorkT] | OutOfMemory[WorkT]]:
        """Yield results as they arrive. Raises what a unit raised, or SearchFailed if one kills MAX_DEATHS replicas."""
        queue: deque[Any] = deque(sorted(units, key=lambda unit: -unit.flops))  # stable, longest first
        deaths: Counter[Any] = Counter()
        self._look(queue)
        while queue or any(slot.in_flight for slot in self._slots):
            self._fill(queue)
            self._metrics.show("queue_length", len(queue))
            self._metrics.show("replicas", sum(slot.starting is None for slot in self._slots))
            done = self._wait(queue, deaths)
            if done is None:
                continue
            slot, unit, reference = done
            try:
                value, seconds = self._fleet.result(reference)
            except ReplicaDied as death:
                self._replace(slot, queue, deaths, death)
                continue
            except DeviceMemoryError as error:
                self._finish(slot, reference)
                yield OutOfMemory(unit, str(error))
                continue
            start_s = self._finish(slot, reference)
            rate = unit.flops / max(seconds, 1e-9)
            self._slowest = min(rate, self._slowest or rate)
            self._metrics.count("units_done")
            yield UnitResult(unit, value, seconds, slot.name, start_s, slot.since)

    def _finish(self, slot: _Place, reference: Any) -> float:
        """Remove a finished unit, so that the next one in flight begins. Returns when the finished unit could begin."""
        del slot.in_flight[reference]
        start_s, slot.since = slot.since, self._fleet.now()
        return start_s

    def _wait(self, queue: deque[Work], deaths: Counter[Work]) -> tuple[_Place, Any, Any] | None:
        """Wait for the next event and handle it. If a unit ended, return its place, the unit and its reference."""
        references = [reference for slot in self._slots for reference in slot.in_flight]
        references += [slot.starting for slot in self._slots if slot.starting is not None]
        deadlines = [slot.since + self._deadline_s(slot) for slot in self._slots if slot.in_flight]
        timeout_s = min([self._looked + LOOK_S, *deadlines]) - self._fleet.now()
        reference = self._fleet.wait(references, max(0.01, timeout_s))
        if self._fleet.now() >= self._looked + LOOK_S:
            self._look(queue)
        self._replace_hung(queue, deaths)
        # The slot may have been dropped in the meantime.
        slot = next((s for s in self._slots if reference == s.starting or reference in s.in_flight), None)
        if reference is None or slot is None:
            return None
        if reference in slot.in_flight:
            return slot, slot.in_flight[reference], reference
        self._go_on_starting(slot, queue)
        return None

    def _fill(self, queue: deque[Work]) -> None:
        """Give units to every ready replica.

        Near the end of the queue each replica gets only one unit, so that no unit waits at a busy replica while another
        replica is idle.
        """
        for depth in range(IN_FLIGHT):
            for slot in self._slots:
                short = len(queue) < IN_FLIGHT * len(self._slots)
                if queue and slot.starting is None and len(slot.in_flight) == depth and not (depth and short):
                    unit = self._take(slot, queue)
                    if unit is None:
                        continue
                    if not slot.in_flight:
                        slot.since = self._fleet.now()
                    slot.in_flight[self._fleet.score(slot.handle, unit)] = unit

    def _take(self, slot: _Place, queue: deque[Any]) -> Any | None:
        """Take the first unit of the queue that may run at a place, or None.

        A unit stays at its home, but another place takes over a home if it has at least two fewer.
        """
        alive = {other.name for other in self._slots}

        def owner(unit: Any) -> str:
            return slot.name if unit.home is None else self._homes.get(unit.home, "")

        index = next((n for n, unit in enumerate(queue) if owner(unit) == slot.name or owner(unit) not in alive), None)
        if index is None:
            homes = Counter(self._homes.values())
            index = next((n for n, unit in enumerate(queue) if homes[owner(unit)] > homes[slot.name] + 1), None)
        if index is None:
            return None
        unit = queue[index]
        del queue[index]
        if unit.home is not None:
            self._homes[unit.home] = slot.name
        return unit

    def _deadline_s(self, slot: _Place) -> float:
        if not slot.in_flight:
            return LOAD_TIMEOUT_S
        unit = next(iter(slot.in_flight.values()))
        least = LEAST_FLOPS_PER_S_OF_GPU if self._needs.num_gpus else LEAST_FLOPS_PER_S
        expected_s = SLOW * unit.flops / self._slowest if self._slowest else unit.flops / least
        return max(self._task_timeout_s, expected_s)

    def _replace_hung(self, queue: deque[Work], deaths: Counter[Work]) -> None:
        for slot in list(self._slots):
            is_loading = slot.is_placed and slot.starting is not None
            running = slot.starting if is_loading else next(iter(slot.in_flight), None)
            late = running is not None and self._fleet.now() - slot.since > self._deadline_s(slot)
            # It may have ended while this process was busy.
            if late and self._fleet.wait([running], 0) is None:
                limit = ReplicaDied(f"no result within {self._deadline_s(slot):.0f} s")
                self._replace(slot, queue, deaths, limit)

    def _replace(self, slot: _Place, queue: deque[Work], deaths: Counter[Work], death: ReplicaDied) -> None:
        """Replace a replica that is dead or hangs, and put its units back at the front of the queue.

        Only the first of these units was running, so only that one can have killed the replica.
        """
        lost = self._take_back(slot, queue)
        node_lives = any(node.id == slot.node.id for node in self._fleet.nodes())
        if lost and node_lives:
            deaths[lost[0]] += 1
            if deaths[lost[0]] >= MAX_DEATHS:
                raise SearchFailed(
                    f"{lost[0]} killed {MAX_DEATHS} replicas; is there enough memory? The last error: {death}"
                )
        self._fleet.stop(slot.handle)
        if not node_lives:
            self._drop(slot, f"its node {slot.node.name} is gone{_again(lost)}")
        elif death.out_of_memory:
            self._withdrawn[slot.node.id] += 1
            self._drop(slot, f"node {slot.node.name} ran out of memory, so it gets one replica fewer{_again(lost)}")
            if not self._slots:
                raise SearchFailed(f"the memory of {slot.node.name} is too small for one replica: {death}")
        else:
            self._count_lost()
            self._say(f"{slot.name} on {slot.node.name} died ({death}); it is replaced{_again(lost)}")
            self._start(slot)

    def _take_back(self, slot: _Place, queue: deque[Work]) -> list[Work]:
        lost = list(slot.in_flight.values())
        queue.extendleft(reversed(lost))
        slot.in_flight.clear()
        return lost

    def _drop(self, slot: _Place, reason: str) -> None:
        self._count_lost()
        self._slots.remove(slot)
        self._say(f"{slot.name} is lost: {reason}")

    def _count_lost(self) -> None:
        self.num_lost += 1
        self._metrics.count("deaths")

    def _look(self, queue: deque[Work], *, is_first: bool = False) -> None:
        """Drop the replicas whose node is gone, and start new ones in free places."""
        self._looked = self._fleet.now()
        nodes = self._fleet.nodes()
        alive = {node.id for node in nodes}
        for slot in [slot for slot in self._slots if slot.node.id not in alive]:
            lost = self._take_back(slot, queue)
            self._fleet.stop(slot.handle)
            self._drop(slot, f"its node {slot.node.name} is gone{_again(lost)}")
        taken = Counter(slot.node.id for slot in self._slots) + self._withdrawn
        places = free_places(nodes, self._needs, taken)
        room = len(places) if self._most is None else max(0, self._most - len(self._slots))
        for node in places[:room]:
            slot = _Place(f"replica-{self._num_slots}", node, *self._fleet.start(node), since=self._looked)
            self._num_slots += 1
            self._slots.append(slot)
            if not is_first:
                self._say(f"{slot.name} starts on {node.name}, which now has a free place")
        self._move_waiting(places[room:])
        self._complain(nodes)

    def _move_waiting(self, places: Sequence[Node]) -> None:
        """Move replicas that wait for a busy node to other nodes."""
        free = list(places)
        for slot in self._slots:
            node = next((node for node in free if node.id != slot.node.id), None)
            if node is None or slot.is_placed or self._looked - slot.since <= MOVE_S:
                continue
            free.remove(node)
            self._say(f"{slot.name} has waited for {slot.node.name}, which is busy; trying {node.name}")
            self._fleet.stop(slot.handle)
            slot.node = node
            self._start(slot)

    def _start(self, slot: _Place) -> None:
        slot.handle, slot.starting = self._fleet.start(slot.node)
        slot.is_placed, slot.since = False, self._fleet.now()

    def _complain(self, nodes: Sequence[Node]) -> None:
        """Report that no replica is ready, at growing intervals. Raises UserError if none gets a place in time."""
        now = self._fleet.now()
        if any(slot.starting is None for slot in self._slots):
            self._idle_since, self._complaint_s = now, FIRST_COMPLAINT_S
        waited_s = now - self._idle_since
        is_placed = any(slot.is_placed for slot in self._slots)
        if waited_s >= self._patience_s and not is_placed:
            state = "others may be using the nodes" if self._slots else "no node has that much"
            raise UserError(
                f"no resources: a replica needs {self._needs} on one node, and none has started after {waited_s:.0f} "
                f"s; {state} ({describe(nodes)}). Free resources, add nodes, or raise `resource_timeout_s`."
            )
        if waited_s >= self._complaint_s:
            self._complaint_s *= 2
            if is_placed:
                self._say(f"no replica is ready after {waited_s:.0f} s: loading the model")
            elif self._slots:
                self._say(
                    f"no replica has started after {waited_s:.0f} s: starting is slow, or others are using the nodes "
                    f"({describe(nodes)}); giving up in {self._patience_s - waited_s:.0f} s"
                )
            else:
                self._say(
                    f"waiting for resources: a replica needs {self._needs} on one node ({describe(nodes)}); giving up "
                    f"in {self._patience_s - waited_s:.0f} s"
                )

    def _go_on_starting(self, slot: _Place, queue: deque[Work]) -> None:
        try:
            word = self._fleet.result(slot.starting)
        except ReplicaDied as death:
            node = slot.node
            self._deaths_at_start[node.id] += not death.out_of_memory
            if self._deaths_at_start[node.id] < MAX_DEATHS:
                self._replace(slot, queue, Counter(), death)
                return
            self._give_up(slot, f"{MAX_DEATHS} replicas in a row died there while loading; is there enough memory?")
            if not self._slots:
                raise SearchFailed(
                    f"{MAX_DEATHS} replicas in a row died on {node.name} while loading; is there enough memory? The "
                    f"last error: {death}"
                ) from death
            return
        except Exception as error:  # any error of the node, even a bug: the other replicas can work without it
            works_elsewhere = any(other.starting is None for other in self._slots)
            others = any(other.node.id != slot.node.id for other in self._slots)
            if not works_elsewhere and not (isinstance(error, NodeUnfit) and others):
                raise
            self._give_up(slot, first_line(error))
            return
        if not slot.is_placed:
            slot.is_placed, slot.since = True, self._fleet.now()
            slot.starting = self._fleet.load(slot.handle)
            return
        self._deaths_at_start[slot.node.id] = 0
        slot.starting = None
        self._say(f"{slot.name} on {slot.node.name} is ready ({word})")

    def _give_up(self, slot: _Place, reason: str) -> None:
        """Stop using a node."""
        for other in [other for other in self._slots if other.node.id == slot.node.id and other.starting is not None]:
            self._fleet.stop(other.handle)
            self._slots.remove(other)
            self._count_lost()
        self._withdrawn[slot.node.id] += self._needs.fit(slot.node)
        self._say(f"node {slot.node.name} gets no more replicas: {reason}")


def _again(lost: list[Work]) -> str:
    return f"; {len(lost)} units will run again" if lost else ""
