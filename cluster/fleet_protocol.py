"""A fleet of replicas as the dispatcher knows it: it starts replicas and forwards calls.

`fleet.py` does so with Ray. Tests and simulations have a fleet with a clock of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from blockpruner.cluster.nodes import Node
from blockpruner.engine.errors import UserError


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
