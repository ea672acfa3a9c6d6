"""Units of work over replicas: longest first, two in flight each, the dead and the hung replaced and their work redone.

Nothing here knows of Ray: a `Fleet` starts replicas and carries calls. So the same code runs in tests and in
simulations with a clock of their own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from blockpruner.cluster.nodes import Needs, Node, describe, free_places
from blockpruner.engine.errors import DeviceMemoryError, SearchFailed, UserError, first_line
from blockpruner.engine.scoring.scoring import OutOfMemory, UnitResult, Work, WorkT

IN_FLIGHT = 2
"""Units queued at a replica: the next one starts without a round trip."""
MAX_DEATHS = 3
"""Replicas that one unit may kill, or that may die in a row while they load on one node, before that ends."""
LOOK_S = 5.0
"""How often the nodes are looked at while work is under way."""
SLOW = 5.0
"""A unit that takes so many times longer than it should hangs."""
FIRST_COMPLAINT_S = 10.0
MOVE_S = 10.0
"""A replica that waits so long for a busy node tries another one."""
LOAD_TIMEOUT_S = 3600.0
"""Loading hangs if it takes longer."""
LEAST_FLOPS_PER_S = 1e9
LEAST_FLOPS_PER_S_OF_GPU = 1e12
"""Assumed of a replica of which nothing is known yet: any working one is faster."""


class ReplicaDied(Exception):
    """A replica's process is gone, and with it what was asked of it."""

    def __init__(self, reason: str, *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory
        """The host had no memory left: starting another one would end in the same way."""


class NodeUnfit(UserError):
    """A node differs from the others in what may change scores."""


class Fleet(Protocol):
    """Starts replicas on nodes, and carries calls to them. A reference stands for the result of a call."""

    def nodes(self) -> list[Node]:
        """Nodes that are alive."""

    def start(self, node: Node) -> tuple[Any, Any]:
        """A new replica's handle, and the reference that is done when its process runs there (its node may be busy)."""

    def load(self, handle: Any) -> Any:
        """Let it load the model. The result is a word about it, for people."""

    def score(self, handle: Any, unit: Any) -> Any:
        """The result is (value, seconds)."""

    def free_bytes(self, handle: Any) -> Any: ...

    def wait(self, references: Sequence[Any], timeout_s: float) -> Any | None:
        """The first reference that is done; None after `timeout_s`."""

    def result(self, reference: Any) -> Any:
        """Of one that is done. Raises ReplicaDied, NodeUnfit, or what the call raised."""

    def stop(self, handle: Any) -> None:
        """End a replica's process at once."""

    def now(self) -> float:
        """Seconds since the epoch."""


@dataclass
class _Slot:
    """A place for a replica on a node. Its process may die and be replaced; the place and its name stay."""

    name: str
    node: Node
    handle: Any
    starting: Any
    """The reference of its start, then of its loading; None once it is ready."""
    is_placed: bool = False
    in_flight: dict[Any, Work] = field(default_factory=dict)
    since: float = 0.0
    """When it was asked to start, to load, or could begin with the first unit in flight."""


class Dispatcher:
    """Does units on all replicas that the nodes hold. Leaving the context ends every replica."""

    def __init__(
        self,
        fleet: Fleet,
        needs: Needs,
        most: int | None,
        say: Callable[[str], None],
        *,
        task_timeout_s: float = 60.0,
        patience_s: float = 60.0,
    ) -> None:
        """most: replicas; None for all that fit.

        task_timeout_s: a unit is given up after this time, or SLOW times what it should take, whichever is longer.
        patience_s: how long to wait while no replica has a place.
        """
        self._fleet = fleet
        self._needs = needs
        self._most = most
        self._say = say
        self._task_timeout_s = task_timeout_s
        self._patience_s = patience_s
        self._slots: list[_Slot] = []
        self._num_slots = 0
        self.num_lost = 0
        self._withdrawn: Counter[str] = Counter()
        """Places, by node, that are not used any more."""
        self._deaths_at_start: Counter[str] = Counter()
        """In a row, by node."""
        self._slowest: float | None = None
        """FLOPs per second of the slowest replica."""
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
        """That score, or will soon: they have a place."""
        return max(1, sum(slot.is_placed for slot in self._slots))

    def free_bytes(self) -> int | None:
        """Device memory beside the weights, as the first replica that is ready sees it."""
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
        """Results as they come in. Raises what a unit raised; SearchFailed if a unit kills MAX_DEATHS replicas."""
        queue: deque[Any] = deque(sorted(units, key=lambda unit: -unit.flops))  # stable, longest first
        deaths: Counter[Any] = Counter()
        self._look(queue)
        while queue or any(slot.in_flight for slot in self._slots):
            self._fill(queue)
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
            yield UnitResult(unit, value, seconds, slot.name, start_s, slot.since)

    def _finish(self, slot: _Slot, reference: Any) -> float:
        """A unit is done; the next in flight begins. Returns when this one could begin."""
        del slot.in_flight[reference]
        start_s, slot.since = slot.since, self._fleet.now()
        return start_s

    def _wait(self, queue: deque[Work], deaths: Counter[Work]) -> tuple[_Slot, Any, Any] | None:
        """Wait for the next thing to happen, and see to it. A unit that ended is returned."""
        references = [reference for slot in self._slots for reference in slot.in_flight]
        references += [slot.starting for slot in self._slots if slot.starting is not None]
        deadlines = [slot.since + self._deadline_s(slot) for slot in self._slots if slot.in_flight]
        timeout_s = min([self._looked + LOOK_S, *deadlines]) - self._fleet.now()
        reference = self._fleet.wait(references, max(0.01, timeout_s))
        if self._fleet.now() >= self._looked + LOOK_S:
            self._look(queue)
        self._replace_hung(queue, deaths)
        # The slot may have gone in the meantime.
        slot = next((s for s in self._slots if reference == s.starting or reference in s.in_flight), None)
        if reference is None or slot is None:
            return None
        if reference in slot.in_flight:
            return slot, slot.in_flight[reference], reference
        self._go_on_starting(slot, queue)
        return None

    def _fill(self, queue: deque[Work]) -> None:
        """Give every ready replica its units; at the end of the queue only one each, so that none waits behind a busy
        replica while another is idle."""
        for depth in range(IN_FLIGHT):
            for slot in self._slots:
                short = len(queue) < IN_FLIGHT * len(self._slots)
                if queue and slot.starting is None and len(slot.in_flight) == depth and not (depth and short):
                    unit = queue.popleft()
                    if not slot.in_flight:
                        slot.since = self._fleet.now()
                    slot.in_flight[self._fleet.score(slot.handle, unit)] = unit

    def _deadline_s(self, slot: _Slot) -> float:
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
            # It may have ended while this process did something else.
            if late and self._fleet.wait([running], 0) is None:
                limit = ReplicaDied(f"no result within {self._deadline_s(slot):.0f} s")
                self._replace(slot, queue, deaths, limit)

    def _replace(self, slot: _Slot, queue: deque[Work], deaths: Counter[Work], death: ReplicaDied) -> None:
        """The slot's replica is dead or hangs: a new one takes its place, and its units go back to the front.

        Only the first of them was running, so only that one is suspected of having killed it.
        """
        lost = self._take_back(slot, queue)
        node_lives = any(node.id == slot.node.id for node in self._fleet.nodes())
        if lost and node_lives:
            deaths[lost[0]] += 1
            if deaths[lost[0]] >= MAX_DEATHS:
                raise SearchFailed(
                    f"{lost[0]} ended {MAX_DEATHS} replicas; is there enough memory? The last one: {death}"
                )
        self._fleet.stop(slot.handle)
        if not node_lives:
            self._drop(slot, f"its node {slot.node.name} is gone{_again(lost)}")
        elif death.out_of_memory:
            self._withdrawn[slot.node.id] += 1
            self._drop(slot, f"node {slot.node.name} ran out of memory, so it gets one replica less{_again(lost)}")
            if not self._slots:
                raise SearchFailed(f"not even one replica fits the memory of {slot.node.name}: {death}")
        else:
            self.num_lost += 1
            self._say(f"{slot.name} on {slot.node.name} ended ({death}); it is replaced{_again(lost)}")
            self._start(slot)

    def _take_back(self, slot: _Slot, queue: deque[Work]) -> list[Work]:
        lost = list(slot.in_flight.values())
        queue.extendleft(reversed(lost))
        slot.in_flight.clear()
        return lost

    def _drop(self, slot: _Slot, reason: str) -> None:
        self.num_lost += 1
        self._slots.remove(slot)
        self._say(f"{slot.name} is lost: {reason}")

    def _look(self, queue: deque[Work], *, is_first: bool = False) -> None:
        """Compare the replicas with the nodes: those whose node is gone are dropped, free places are filled."""
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
            slot = _Slot(f"replica-{self._num_slots}", node, *self._fleet.start(node), since=self._looked)
            self._num_slots += 1
            self._slots.append(slot)
            if not is_first:
                self._say(f"{slot.name} starts on {node.name}, which has a place now")
        self._move_waiting(places[room:])
        self._complain(nodes)

    def _move_waiting(self, places: Sequence[Node]) -> None:
        """Replicas that wait for a busy node try other nodes, one after the other."""
        free = list(places)
        for slot in self._slots:
            node = next((node for node in free if node.id != slot.node.id), None)
            if node is None or slot.is_placed or self._looked - slot.since <= MOVE_S:
                continue
            free.remove(node)
            self._say(f"{slot.name} waits for {slot.node.name}, which is busy: it tries {node.name}")
            self._fleet.stop(slot.handle)
            slot.node = node
            self._start(slot)

    def _start(self, slot: _Slot) -> None:
        slot.handle, slot.starting = self._fleet.start(slot.node)
        slot.is_placed, slot.since = False, self._fleet.now()

    def _complain(self, nodes: Sequence[Node]) -> None:
        """While no replica is ready: say so, more and more seldom. While none has a place, at last give up."""
        now = self._fleet.now()
        if any(slot.starting is None for slot in self._slots):
            self._idle_since, self._complaint_s = now, FIRST_COMPLAINT_S
        waited_s = now - self._idle_since
        is_placed = any(slot.is_placed for slot in self._slots)
        if waited_s >= self._patience_s and not is_placed:
            state = "has not started there, they may be in use by others," if self._slots else "finds no node for that"
            raise UserError(
                f"no resources: a replica needs {self._needs} on one node, and {state} after {waited_s:.0f} s "
                f"({describe(nodes)}); free them, add nodes, or raise --resource-timeout-s."
            )
        if waited_s >= self._complaint_s:
            self._complaint_s *= 2
            if is_placed:
                self._say(f"no replica is ready after {waited_s:.0f} s: loading the model")
            elif self._slots:
                self._say(
                    f"no replica has started after {waited_s:.0f} s: it takes its time, or others use the nodes "
                    f"({describe(nodes)}); giving up in {self._patience_s - waited_s:.0f} s"
                )
            else:
                self._say(
                    f"waiting for resources: a replica needs {self._needs} on one node ({describe(nodes)}); giving up "
                    f"in {self._patience_s - waited_s:.0f} s"
                )

    def _go_on_starting(self, slot: _Slot, queue: deque[Work]) -> None:
        try:
            word = self._fleet.result(slot.starting)
        except ReplicaDied as death:
            node = slot.node
            self._deaths_at_start[node.id] += not death.out_of_memory
            if self._deaths_at_start[node.id] < MAX_DEATHS:
                self._replace(slot, queue, Counter(), death)
                return
            self._give_up(slot, f"{MAX_DEATHS} replicas in a row died there while they loaded; is there enough memory?")
            if not self._slots:
                raise SearchFailed(
                    f"{MAX_DEATHS} replicas died one after the other on {node.name} while they loaded; is there enough "
                    f"memory? The last one: {death}"
                ) from death
            return
        except Exception as error:  # what it raised there, be it a bug: others may do without that node
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

    def _give_up(self, slot: _Slot, reason: str) -> None:
        """A node is not used any more."""
        for other in [other for other in self._slots if other.node.id == slot.node.id and other.starting is not None]:
            self._fleet.stop(other.handle)
            self._slots.remove(other)
            self.num_lost += 1
        self._withdrawn[slot.node.id] += self._needs.fit(slot.node)
        self._say(f"node {slot.node.name} gets no more replicas: {reason}")


def _again(lost: list[Work]) -> str:
    return f"; {len(lost)} units are done again" if lost else ""
