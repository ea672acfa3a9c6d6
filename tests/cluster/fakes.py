"""Replicas that misbehave on purpose."""

import os
import time
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from blockpruner.cluster.actor import Replica
from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.scoring.scoring import ReplicaSpec
from blockpruner.engine.work.units import WorkUnit

POISON = Mask.parse("mlp.2")


class PoisonedReplica(Replica):
    """Dies whenever it is asked to score POISON."""

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        if POISON in unit.masks:
            os._exit(1)
        return super().score(unit)


class SlowReplica(Replica):
    """Leaves time to be killed."""

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        time.sleep(0.3)
        return super().score(unit)


def hanging_once(marker: Path) -> type[Replica]:
    """The first unit of all hangs, and no other."""

    class HangingReplica(Replica):
        def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
            with suppress(FileExistsError):
                marker.touch(exist_ok=False)
                time.sleep(3600)
            return super().score(unit)

    return HangingReplica


class FaultyReplica(Replica):
    """Raises while scoring."""

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        raise ZeroDivisionError("a bug in our code")


class UnloadableReplica(Replica):
    def load(self, spec: ReplicaSpec, windows: Tensor) -> str:
        raise UserError("expected a model, got a stone.")


class DyingReplica(Replica):
    def load(self, spec: ReplicaSpec, windows: Tensor) -> str:
        os._exit(1)
