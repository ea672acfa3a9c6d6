"""The Ray actor that holds one replica.

The methods import torch, so that `placed` returns as soon as the process runs and a slow start does not look like a
busy node.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockpruner.cluster.preflight import Survey
    from blockpruner.engine.scoring.replica import ReplicaSpec


class ReplicaActor:
    """Loads the model in a method instead of the constructor, so that Ray passes on the original exception."""

    _shared: tuple[Any, Any] | None = None
    """What the last units share, with its reference."""

    def placed(self) -> None:
        """Return as soon as the process runs."""

    def check(self, spec: ReplicaSpec, expected: Survey, *, allow_mixed: bool) -> ReplicaSpec:
        """Return the spec, so that `load` depends on this check. Raises NodeUnfit if this node is not as expected."""
        from blockpruner.cluster.fleet_protocol import NodeUnfit
        from blockpruner.cluster.preflight import differences, survey

        unlike = differences(expected, survey(spec.model, spec.device), allow_mixed=allow_mixed)
        if unlike:
            raise NodeUnfit(f"it differs from the others: {', '.join(unlike)} (`allow_mixed` permits other hardware)")
        return spec

    def load(self, spec: ReplicaSpec, data: Any) -> str:
        self._replica = spec.open(data)
        return f"process {os.getpid()}"

    def score(self, unit: Any, shared: Sequence[Any] = ()) -> tuple[Any, float]:
        """shared: reference of what the unit shares with others."""
        import torch

        if shared:
            unit = replace(unit, shared=self._fetched(shared[0]))
        try:
            return self._replica.score(unit)
        except torch.AcceleratorError as error:  # the GPU context of this process is lost; a new process works
            print(error, file=sys.stderr, flush=True)
            os._exit(1)

    def _fetched(self, reference: Any) -> Any:
        import ray

        if self._shared is None or self._shared[0] != reference:
            self._shared = None  # free its memory first
            self._shared = reference, ray.get(reference)
        return self._shared[1]

    def free_bytes(self) -> int | None:
        return self._replica.free_bytes()
