"""The Ray actor: one replica, one line a method."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from cluster.preflight import Survey, survey
from engine.loading import ModelSource
from engine.scoring import MaskScorer, ReplicaSpec
from engine.units import KernelShape, WorkUnit


class Replica:
    """Loading is a method, not the constructor, so that what goes wrong in it arrives as itself."""

    def survey(self, model: ModelSource, device: str) -> Survey:
        return survey(model, device)

    def load(self, spec: ReplicaSpec, windows: Tensor) -> str:
        self._scorer = MaskScorer(spec, windows)
        return f"process {os.getpid()}"

    def score(self, unit: WorkUnit, kernel: KernelShape) -> tuple[list[list[float]], float]:
        try:
            return self._scorer.score(unit, kernel)
        except torch.AcceleratorError as error:  # the process's GPU context is broken for good; another process works
            print(error, file=sys.stderr, flush=True)
            os._exit(1)

    def free_bytes(self) -> int | None:
        return self._scorer.free_bytes()
