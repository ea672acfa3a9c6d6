"""Replicas that misbehave on purpose."""

import os
import time
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from blockpruner.cluster.actor import ReplicaActor
from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.scoring.scoring import ScoringSpec
from blockpruner.engine.work.units import WorkUnit

POISON = Mask.parse("mlp.2")


class PoisonedReplica(ReplicaActor):
    """Dies whenever it is asked to score POISON."""

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        if POISON in unit.masks:
            os._exit(1)
        return super().score(unit)


class SlowReplica(ReplicaActor):
    """Leaves time to be killed."""

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        time.sleep(0.3)
        return super().score(unit)


def hanging_once(marker: Path) -> type[ReplicaActor]:
    """The first unit of all hangs, and no other."""

    class HangingReplica(ReplicaActor):
        def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
            with suppress(FileExistsError):
                marker.touch(exist_ok=False)
                time.sleep(3600)
            return super().score(unit)

    return HangingReplica


class FaultyReplica(ReplicaActor):
    """Raises while scoring."""

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        raise ZeroDivisionError("a bug in our code")


class WitnessingReplica(ReplicaActor):
    """Tells what it sees of the GPUs."""

    def load(self, spec: ScoringSpec, windows: Tensor) -> str:
        super().load(spec, windows)
        return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}"


class UnloadableReplica(ReplicaActor):
    def load(self, spec: ScoringSpec, windows: Tensor) -> str:
        raise UserError("expected a model, got a stone.")


class DyingReplica(ReplicaActor):
    def load(self, spec: ScoringSpec, windows: Tensor) -> str:
        os._exit(1)
