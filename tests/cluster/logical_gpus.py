"""What replicas on logical GPUs see, and which they use: run as a program with a cluster's address and a model.

The last line of stdout is JSON.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blockpruner.cluster.nodes import Needs
from blockpruner.cluster.opening import open_scorer
from blockpruner.cluster.options import Replicas
from blockpruner.cluster.session import ray_session
from blockpruner.engine.scoring.scorer import Scorer
from blockpruner.engine.scoring.scoring import ScoringSpec
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.units import KernelShape, WorkUnit

KERNEL = KernelShape(rows=1, head_tokens=1, masks=1, windows=1, threads=1)


@dataclass
class Work:
    """Implements `opening.Assignment`."""

    model: ModelSource
    device: str = "cuda"
    threads: int = 1
    num_gpus: int = 1
    data: Any = None
    result_bytes: int = 0

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[ScoringSpec, Needs]:
        spec = ScoringSpec(model=self.model, dtype="float32", device=self.device, threads=1)
        return spec, Needs(1, self.num_gpus)


def ready(scorer: Scorer, said: Sequence[str], number: int) -> list[str]:
    """Wait until so many replicas have loaded, and return what they said."""
    while sum("is ready" in text for text in said) < number:
        list(scorer.run([WorkUnit((), index, index + 1, 1, KERNEL) for index in range(20)]))
    return sorted(text.partition("ready ")[2] for text in said if "is ready" in text)


def main(address: str, model: str) -> None:
    with ray_session(address, 1):
        from blockpruner.cluster import fleet as fleet_module
        from blockpruner.cluster.actor import ReplicaActor
        from blockpruner.cluster.dispatch import Dispatcher

        class Witness(ReplicaActor):
            def check(self, spec: ScoringSpec, *others: Any, **options: Any) -> ScoringSpec:
                return spec

            def load(self, spec: ScoringSpec, windows: Tensor) -> str:
                return os.environ["CUDA_VISIBLE_DEVICES"]

            def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
                return [], 0.1

        fleet_module.ReplicaActor = Witness  # type: ignore[misc]
        found: dict[str, list[str]] = {}
        work = Work(ModelSource(model))
        for num_gpus in (1, 2):
            said: list[str] = []
            work.num_gpus = num_gpus
            spec, needs = work.settle(0, 0)
            fleet = fleet_module.RayFleet(spec, work.data, needs, expected=None)
            expected = sum(needs.fit(node) for node in fleet.nodes())
            with Dispatcher(fleet, needs, None, said.append, patience_s=240.0) as dispatcher:
                found[f"{num_gpus} each"] = ready(dispatcher, said, expected)
        said = []
        with open_scorer(Replicas(address=address), Work(ModelSource(model)), said.append, "run") as opened:
            found["one kind"] = ready(opened.scorer, said, 2)
        found["notes"] = [text for text in said if text.startswith("note: ")]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
