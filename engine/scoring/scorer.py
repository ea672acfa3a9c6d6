"""Scorers run units of work, in this process or on a cluster (`cluster/dispatch.py`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from blockpruner.engine.errors import DeviceMemoryError
from blockpruner.engine.scoring.replica import Replica


class Work(Protocol):
    """A unit of work for a replica. Its text form describes it."""

    @property
    def flops(self) -> float:
        """Approximate cost. Larger units are scheduled first."""

    @property
    def home(self) -> Any:
        """Units with the same home run on the same replica while it lives, because it keeps something for them. None:
        they run anywhere."""

    # A unit may have a field `shared`: what is large and the same object for many units. It is sent once.


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(frozen=True)
class UnitResult(Generic[WorkT]):
    unit: WorkT
    value: Any
    """In a search: loss sums [masks][windows of the unit]."""
    seconds: float
    """Seconds that the replica took."""
    replica: str
    start_s: float
    """When the replica could start the unit, as far as the scorer knows, in seconds since the epoch."""
    stop_s: float
    """When the result arrived, in seconds since the epoch."""


@dataclass(frozen=True)
class OutOfMemory(Generic[WorkT]):
    """A unit that did not fit in the device's memory."""

    unit: WorkT
    reason: str


class Scorer(Protocol):
    """Runs units of work. Results arrive in any order."""

    @property
    def num_replicas(self) -> int:
        """Number of replicas that are scoring or starting."""

    @property
    def num_lost(self) -> int:
        """Number of replicas lost so far, because they died or their node was lost."""

    def free_bytes(self) -> int | None:
        """Device memory that the weights leave free, in bytes; None on a CPU."""

    def run(self, units: Sequence[WorkT]) -> Iterator[UnitResult[WorkT] | OutOfMemory[WorkT]]: ...


class LocalScorer:
    """The in-process scorer: one replica, no Ray, errors unwrapped."""

    num_replicas = 1
    num_lost = 0

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def free_bytes(self) -> int | None:
        return self._replica.free_bytes()

    def run(self, units: Sequence[WorkT]) -> Iterator[UnitResult[WorkT] | OutOfMemory[WorkT]]:
        for unit in units:
            start_s = time.time()
            try:
                value, seconds = self._replica.score(unit)
            except DeviceMemoryError as error:
                yield OutOfMemory(unit, str(error))
            else:
                yield UnitResult(unit, value, seconds, replica="local", start_s=start_s, stop_s=time.time())
