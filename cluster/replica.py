"""The Ray actor: one replica, one line a method."""

from __future__ import annotations

import os

from torch import Tensor

from engine.loading import ModelSource
from engine.scoring import MaskScorer
from engine.units import KernelShape, WorkUnit


class Replica:
    """Loading is a method, not the constructor, so that what goes wrong in it arrives as itself."""

    def load(self, model: ModelSource, dtype: str, device: str, windows: Tensor, threads: int) -> int:
        """Load the model; returns the process id."""
        self._scorer = MaskScorer(model, dtype=dtype, device=device, windows=windows, threads=threads)
        return os.getpid()

    def score(self, unit: WorkUnit, kernel: KernelShape) -> tuple[list[list[float]], float]:
        return self._scorer.score(unit, kernel)

    def is_batch_invariant(self, kernel: KernelShape) -> bool:
        return self._scorer.is_batch_invariant(kernel)
