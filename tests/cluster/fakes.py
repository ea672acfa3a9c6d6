"""Replicas that misbehave on purpose."""

import os
import time

from torch import Tensor

from cluster.replica import Replica
from engine.blocks import Mask
from engine.errors import UserError
from engine.loading import ModelSource
from engine.units import KernelShape, WorkUnit

POISON = Mask.parse("mlp.2")


class PoisonedReplica(Replica):
    """Dies whenever it is asked to score POISON."""

    def score(self, unit: WorkUnit, kernel: KernelShape) -> tuple[list[list[float]], float]:
        if POISON in unit.masks:
            os._exit(1)
        return super().score(unit, kernel)


class SlowReplica(Replica):
    """Leaves time to be killed."""

    def score(self, unit: WorkUnit, kernel: KernelShape) -> tuple[list[list[float]], float]:
        time.sleep(0.3)
        return super().score(unit, kernel)


class FaultyReplica(Replica):
    """Raises while scoring."""

    def score(self, unit: WorkUnit, kernel: KernelShape) -> tuple[list[list[float]], float]:
        raise ZeroDivisionError("a bug in our code")


class UnloadableReplica(Replica):
    def load(self, model: ModelSource, dtype: str, device: str, windows: Tensor, threads: int) -> int:
        raise UserError("expected a model, got a stone.")


class DyingReplica(Replica):
    def load(self, model: ModelSource, dtype: str, device: str, windows: Tensor, threads: int) -> int:
        os._exit(1)


class ProbeKilledReplica(Replica):
    """Loads, and dies of the first masks that it scores."""

    def is_batch_invariant(self, kernel: KernelShape) -> bool:
        os._exit(1)
