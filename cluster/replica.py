"""The Ray actor: one replica, one line a method."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from cluster.preflight import Survey, survey
from engine.loading import ModelSource
from engine.scoring import WorkerSpec


class Replica:
    """Loading is a method, not the constructor, so that what goes wrong in it arrives as itself."""

    def survey(self, model: ModelSource, device: str) -> Survey:
        return survey(model, device)

    def load(self, spec: WorkerSpec, data: Any) -> str:
        self._worker = spec.open(data)
        return f"process {os.getpid()}"

    def score(self, unit: Any) -> tuple[Any, float]:
        try:
            return self._worker.score(unit)
        except torch.AcceleratorError as error:  # the process's GPU context is broken for good; another process works
            print(error, file=sys.stderr, flush=True)
            os._exit(1)

    def free_bytes(self) -> int | None:
        return self._worker.free_bytes()
