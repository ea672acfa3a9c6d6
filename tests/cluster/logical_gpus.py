"""What replicas on logical GPUs see: run as a program with a cluster's address; the last line of stdout is JSON."""

import json
import os
import sys

from torch import Tensor

from blockpruner.cluster.session import ray_session
from blockpruner.engine.scoring.scoring import ScoringSpec
from blockpruner.engine.work.units import KernelShape, WorkUnit

KERNEL = KernelShape(rows=1, head_tokens=1, masks=1, windows=1, threads=1)


def main(address: str) -> None:
    with ray_session(address, 1):
        import torch

        from blockpruner.cluster import fleet as fleet_module
        from blockpruner.cluster.actor import ReplicaActor
        from blockpruner.cluster.dispatch import Dispatcher
        from blockpruner.cluster.nodes import Needs
        from blockpruner.engine.sections import ModelSource

        class Witness(ReplicaActor):
            def load(self, spec: ScoringSpec, windows: Tensor) -> str:
                return os.environ["CUDA_VISIBLE_DEVICES"]

            def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
                return [], 0.1

        fleet_module.ReplicaActor = Witness  # type: ignore[misc]
        said: list[str] = []
        spec = ScoringSpec(model=ModelSource("none"), dtype="float32", device="cuda", threads=1)
        found = {}
        for num_gpus in (1, 2):
            needs = Needs(num_cpus=1, num_gpus=num_gpus)
            fleet = fleet_module.RayFleet(spec, torch.zeros(1), needs, expected=None)
            expected = sum(needs.fit(node) for node in fleet.nodes())
            with Dispatcher(fleet, needs, None, said.append, patience_s=240.0) as dispatcher:
                while sum("is ready" in text for text in said) < expected:
                    list(dispatcher.run([WorkUnit((), number, number + 1, 1, KERNEL) for number in range(20)]))
            found[num_gpus] = sorted(text.partition("ready ")[2] for text in said if "is ready" in text)
            said.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
