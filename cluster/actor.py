"""The Ray actor: one replica, one line a method.

Torch is imported by the methods: so `placed` answers as soon as there is a process, and a slow start is not mistaken
for a busy node.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockpruner.cluster.preflight import Survey
    from blockpruner.engine.scoring.scoring import WorkerSpec


class Replica:
    """Loading is a method, not the constructor, so that what goes wrong in it arrives as itself."""

    def placed(self) -> None:
        """There is a process."""

    def check(self, spec: WorkerSpec, expected: Survey, *, allow_mixed: bool) -> WorkerSpec:
        """Returns the spec, for `load` to depend on. Raises NodeUnfit if this node is not as expected."""
        from blockpruner.cluster.dispatch import NodeUnfit
        from blockpruner.cluster.preflight import differences, survey

        unlike = differences(expected, survey(spec.model, spec.device), allow_mixed=allow_mixed)
        if unlike:
            raise NodeUnfit(f"it differs from the others: {', '.join(unlike)} (--allow-mixed takes other hardware)")
        return spec

    def load(self, spec: WorkerSpec, data: Any) -> str:
        self._worker = spec.open(data)
        return f"process {os.getpid()}"

    def score(self, unit: Any) -> tuple[Any, float]:
        import torch

        try:
            return self._worker.score(unit)
        except torch.AcceleratorError as error:  # the process's GPU context is broken for good; another process works
            print(error, file=sys.stderr, flush=True)
            os._exit(1)

    def free_bytes(self) -> int | None:
        return self._worker.free_bytes()
