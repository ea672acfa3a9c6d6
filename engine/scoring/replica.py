"""A replica: one copy of a model, on one or several devices. It runs units of work and does not know where it runs."""

from __future__ import annotations

from typing import Any, Protocol

from blockpruner.engine.sections import ModelSource


class Replica(Protocol):
    """Holds a model and runs units of work with it."""

    def score(self, unit: Any) -> tuple[Any, float]:
        """Return the result and the seconds taken. Raises DeviceMemoryError."""

    def free_bytes(self) -> int | None:
        """Device memory that the weights leave free, in bytes; None on a CPU."""


class ReplicaSpec(Protocol):
    """Which model a replica holds, and on which devices. It is sent to an actor and opened there."""

    @property
    def model(self) -> ModelSource: ...

    @property
    def device(self) -> str:
        """cpu or cuda."""

    def open(self, data: Any) -> Replica: ...
