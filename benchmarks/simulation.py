"""A simulated fleet of replicas with its own clock, to run the dispatcher's code without waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockpruner.cluster.fleet_protocol import ReplicaDied
from blockpruner.cluster.nodes import Node
from blockpruner.engine.work.units import WorkUnit

FOREVER = float("inf")


@dataclass(eq=False)
class Call:
    """A reference that is ready at a given time, with a value or an error."""

    done_s: float
    value: Any = None
    error: BaseException | None = None


@dataclass(eq=False)
class SimulatedReplica:
    name: str
    node: Node
    free_s: float
    """When it has done all that it was asked so far."""
    calls: list[Call] = field(default_factory=list)
    is_alive: bool = True


class SimulatedFleet:
    """Implements `fleet_protocol.Fleet`. Events happen at the times given to `at`."""

    def __init__(
        self,
        nodes: Sequence[Node],
        seconds: Callable[[WorkUnit], float],
        *,
        sums: Callable[[WorkUnit], list[list[float]]] = lambda unit: (
            [[0.0] * (unit.stop - unit.first)] * len(unit.masks)
        ),
        start_s: float = 0.0,
        load_s: float = 0.0,
        call_s: float = 0.0,
        driver_s: float = 0.0,
        end_s: float = FOREVER,
    ) -> None:
        """seconds: time of a unit. start_s, load_s: time for a replica to start and to load. call_s: time of a call
        from the driver to an idle replica. driver_s: time that the driver spends on a unit, in which it does nothing
        else. end_s: a run that goes on for longer waits forever, and fails."""
        self.alive = list(nodes)
        self.replicas: list[SimulatedReplica] = []
        self.num_scored = 0
        self.busy_until: dict[str, float] = {}
        """By node id: until then it starts no replica."""
        self._seconds, self._sums = seconds, sums
        self._start_s, self._load_s, self._call_s, self._driver_s = start_s, load_s, call_s, driver_s
        self._end_s = end_s
        self._clock = 0.0
        self._agenda: list[tuple[float, Callable[[], None]]] = []

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self._agenda = sorted([*self._agenda, (time_s, action)], key=lambda entry: entry[0])

    def kill(self, name: str, reason: str = "killed", *, out_of_memory: bool = False) -> None:
        """Kill the replica with this name if it is alive; all its calls fail."""
        for replica in self.replicas:
            if replica.name == name and replica.is_alive:
                self._end(replica, ReplicaDied(reason, out_of_memory=out_of_memory))

    def lose(self, node: Node, *, noticed_s: float = 0.0) -> None:
        """Remove a node; the cluster notices it some time later."""
        for replica in self.replicas:
            if replica.node == node and replica.is_alive:
                self._end(replica, ReplicaDied("node lost"))
        self.busy_until[node.id] = FOREVER
        self.at(self._clock + noticed_s, lambda: self.alive.remove(node) if node in self.alive else None)

    def nodes(self) -> list[Node]:
        return list(self.alive)

    def start(self, node: Node) -> tuple[Any, Any]:
        number = sum(replica.node == node for replica in self.replicas)
        begin_s = max(self._clock, self.busy_until.get(node.id, 0.0))
        replica = SimulatedReplica(f"{node.name}#{number}", node, begin_s)
        self.replicas.append(replica)
        return replica, self._call(replica, self._start_s, None)

    def load(self, handle: SimulatedReplica) -> Any:
        return self._call(handle, self._load_s, handle.name)

    def score(self, handle: SimulatedReplica, unit: WorkUnit) -> Any:
        self._clock += self._driver_s
        self.num_scored += 1
        seconds = self._seconds(unit)
        handle.free_s = max(handle.free_s, self._clock + self._call_s)
        return self._call(handle, seconds, (self._sums(unit), seconds))

    def free_bytes(self, handle: SimulatedReplica) -> Any:
        return self._call(handle, 0.0, None)

    def wait(self, references: Sequence[Call], timeout_s: float) -> Call | None:
        assert self._clock <= self._end_s, "the run does not end"
        until = self._clock + timeout_s
        while True:
            first = min(references, key=lambda call: call.done_s, default=None)
            done_s = first.done_s if first is not None else FOREVER
            if self._agenda and self._agenda[0][0] <= min(done_s, until):
                time_s, action = self._agenda.pop(0)
                self._clock = max(self._clock, time_s)
                action()
                continue
            self._clock = max(self._clock, min(done_s, until))
            return first if done_s <= until else None

    def result(self, reference: Call) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def stop(self, handle: SimulatedReplica) -> None:
        self._end(handle, ReplicaDied("stopped"))

    def now(self) -> float:
        return self._clock

    def _call(self, replica: SimulatedReplica, seconds: float, value: Any) -> Call:
        begin_s = max(self._clock, replica.free_s)
        replica.free_s = begin_s + seconds
        call = Call(replica.free_s, value)
        if not replica.is_alive:
            call = Call(self._clock, error=ReplicaDied("it is dead"))
        replica.calls.append(call)
        return call

    def _end(self, replica: SimulatedReplica, error: ReplicaDied) -> None:
        replica.is_alive = False
        for call in replica.calls:
            if call.done_s > self._clock:
                call.done_s, call.error = self._clock, error
