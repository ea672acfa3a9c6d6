"""Decides where replicas are: starts them in the free places of nodes, replaces those that die, gives up nodes.

Like the dispatcher, which gives them units, this module does not use Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockpruner.cluster.fleet_protocol import Fleet, NodeUnfit, ReplicaDied
from blockpruner.cluster.metrics import Metrics
from blockpruner.cluster.nodes import Needs, Node, describe, free_places
from blockpruner.engine.errors import SearchFailed, UserError, first_line
from blockpruner.engine.scoring.scorer import Work

MAX_DEATHS = 3
"""Limit on replicas killed by one unit, and on consecutive deaths while loading on one node."""
FIRST_COMPLAINT_S = 10.0
LATE_S = 10.0
"""A replica whose process does not run by then waits for a busy node or starts slowly. One cannot see which."""


@dataclass
class Place:
    """A place for a replica on a node. The process can die and be replaced; the place and its name stay."""

    name: str
    node: Node
    handle: Any
    starting: Any
    """The reference of the start, then of the loading; None once the replica is ready."""
    is_placed: bool = False
    """Whether its process runs."""
    in_flight: dict[Any, Work] = field(default_factory=dict)
    since: float = 0.0
    """When the current activity began: the start, the loading, or the first unit in flight."""

    def take_back(self) -> list[Work]:
        """Return the units in flight, the first of which was running, and forget them."""
        lost = list(self.in_flight.values())
        self.in_flight.clear()
        return lost


class Places:
    """The places of all replicas that fit the nodes."""

    def __init__(
        self,
        fleet: Fleet,
        needs: Needs,
        most: int | None,
        say: Callable[[str], None],
        metrics: Metrics,
        *,
        patience_s: float,
    ) -> None:
        """most, patience_s: as for the dispatcher."""
        self._fleet = fleet
        self._needs = needs
        self._most = most
        self._say = say
        self._metrics = metrics
        self._patience_s = patience_s
        self._places: list[Place] = []
        self._num_named = 0
        self.num_lost = 0
        """Number of replicas lost so far."""
        self._withdrawn: Counter[str] = Counter()
        """Number of places per node that are no longer used."""
        self._deaths_at_start: Counter[str] = Counter()
        """Consecutive deaths per node."""
        self.looked = self._idle_since = self._unplaced_since = fleet.now()
        """When the nodes were checked last, when a replica was ready last, and when a process of one ran last."""
        self._complaint_s = FIRST_COMPLAINT_S
        self.look(is_first=True)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def node_lives(self, place: Place) -> bool:
        return any(node.id == place.node.id for node in self._fleet.nodes())

    def look(self, *, is_first: bool = False) -> list[Work]:
        """Drop the places whose node is gone, and start replicas in free ones. Returns the units that were lost.

        A late replica goes on, but another one starts on another node. The first of them that runs is used, so that
        neither a busy node nor a slow start holds up a run.
        """
        self.looked = self._fleet.now()
        nodes = self._fleet.nodes()
        alive = {node.id for node in nodes}
        lost: list[Work] = []
        for place in [place for place in self._places if place.node.id not in alive]:
            of_place = place.take_back()
            lost = of_place + lost
            self._fleet.stop(place.handle)
            self._drop(place, f"its node {place.node.name} is gone{_again(of_place)}")
        late = [place for place in self._places if not place.is_placed and self.looked - place.since > LATE_S]
        taken = Counter(place.node.id for place in self._places) + self._withdrawn
        where = {place.node.id for place in late}
        free = [node for node in free_places(nodes, self._needs, taken) if node.id not in where]
        room = len(free) if self._most is None else max(0, self._most - len(self._places) + len(late))
        waiting = "".join(f"; {place.name} still waits for {place.node.name}" for place in late)
        for node in free[:room]:
            place = Place(f"replica-{self._num_named}", node, *self._fleet.start(node), since=self.looked)
            self._num_named += 1
            self._places.append(place)
            if not is_first:
                self._say(f"{place.name} starts on {node.name}, which has a free place{waiting}")
        self._complain(nodes)
        return lost

    def _start(self, place: Place) -> None:
        place.handle, place.starting = self._fleet.start(place.node)
        place.is_placed, place.since = False, self._fleet.now()

    def _complain(self, nodes: Sequence[Node]) -> None:
        """Report that no replica is ready, at growing intervals. Raises UserError if none gets a place in time."""
        now = self._fleet.now()
        if any(place.starting is None for place in self._places):
            self._idle_since, self._complaint_s = now, FIRST_COMPLAINT_S
        is_placed = any(place.is_placed for place in self._places)
        if is_placed:
            self._unplaced_since = now
        waited_s, unplaced_s = now - self._idle_since, now - self._unplaced_since
        if unplaced_s >= self._patience_s:
            state = "others may be using the nodes" if self._places else "no node has that much"
            raise UserError(
                f"no resources: a replica needs {self._needs} on one node, and none has started after "
                f"{unplaced_s:.0f} s; {state} ({describe(nodes)}). Free resources, add nodes, or raise "
                f"`resource_timeout_s`."
            )
        if waited_s >= self._complaint_s:
            self._complaint_s *= 2
            if is_placed:
                self._say(f"no replica is ready after {waited_s:.0f} s: loading the model")
            elif self._places:
                self._say(
                    f"no replica has started after {waited_s:.0f} s: starting is slow, or others are using the nodes "
                    f"({describe(nodes)}); giving up in {self._patience_s - unplaced_s:.0f} s"
                )
            else:
                self._say(
                    f"waiting for resources: a replica needs {self._needs} on one node ({describe(nodes)}); giving up "
                    f"in {self._patience_s - unplaced_s:.0f} s"
                )

    def go_on_starting(self, place: Place) -> None:
        """Go on with a replica whose start or loading has ended, well or not. Raises what ends the whole run."""
        try:
            word = self._fleet.result(place.starting)
        except ReplicaDied as death:
            self.replace_unready(place, death)
            return
        except Exception as error:  # any error of the node, even a bug: the other replicas can work without it
            works_elsewhere = any(other.starting is None for other in self._places)
            if not works_elsewhere and not isinstance(error, NodeUnfit):
                raise
            self._give_up(place, first_line(error))
            if not self._places:
                raise
            return
        if not place.is_placed:
            place.is_placed, place.since = True, self._fleet.now()
            place.starting = self._fleet.load(place.handle)
            self._drop_spare()
            return
        self._deaths_at_start[place.node.id] = 0
        place.starting = None
        self._say(f"{place.name} on {place.node.name} is ready ({word})")

    def replace_unready(self, place: Place, death: ReplicaDied) -> None:
        """Replace a replica that died or hung before it was ready, or give up its node. Raises SearchFailed if no other
        node is left."""
        node = place.node
        self._deaths_at_start[node.id] += not death.out_of_memory
        if self._deaths_at_start[node.id] < MAX_DEATHS:
            self.replace(place, death)
            return
        self._give_up(place, f"{MAX_DEATHS} replicas in a row died there while loading; is there enough memory?")
        if not self._places:
            raise SearchFailed(
                f"{MAX_DEATHS} replicas in a row died on {node.name} while loading; is there enough memory? The last "
                f"error: {death}"
            ) from death

    def replace(self, place: Place, death: ReplicaDied, lost: Sequence[Work] = ()) -> None:
        """Replace a replica that is dead or hangs. lost: its units, which will run again."""
        node_lives = self.node_lives(place)
        self._fleet.stop(place.handle)
        if not node_lives:
            self._drop(place, f"its node {place.node.name} is gone{_again(lost)}")
        elif death.out_of_memory:
            self._withdrawn[place.node.id] += 1
            self._drop(place, f"node {place.node.name} ran out of memory, so it gets one replica fewer{_again(lost)}")
            if not self._places:
                raise SearchFailed(f"the memory of {place.node.name} is too small for one replica: {death}")
        else:
            self._count_lost()
            self._say(f"{place.name} on {place.node.name} died ({death}); it is replaced{_again(lost)}")
            self._start(place)

    def _drop_spare(self) -> None:
        """Stop the replicas that still wait for their nodes, if as many run as were asked for."""
        if sum(place.is_placed for place in self._places) == self._most:
            for spare in [place for place in self._places if not place.is_placed]:
                self._fleet.stop(spare.handle)
                self._places.remove(spare)
                self._say(f"{spare.name} is not needed: it still waits for {spare.node.name}, and others run")

    def _drop(self, place: Place, reason: str) -> None:
        self._count_lost()
        self._places.remove(place)
        self._say(f"{place.name} is lost: {reason}")

    def _count_lost(self) -> None:
        self.num_lost += 1
        self._metrics.count("deaths")

    def _give_up(self, place: Place, reason: str) -> None:
        """Stop using a node."""
        for other in [other for other in self._places if other.node.id == place.node.id and other.starting is not None]:
            self._fleet.stop(other.handle)
            self._places.remove(other)
            self._count_lost()
        self._withdrawn[place.node.id] += self._needs.fit(place.node)
        self._say(f"node {place.node.name} gets no more replicas: {reason}")
        if not self._places:  # as few replicas as were asked for, and other nodes may be free
            self.look()


def _again(lost: Sequence[Work]) -> str:
    return f"; {len(lost)} units will run again" if lost else ""
