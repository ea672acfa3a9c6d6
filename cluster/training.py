"""Training on several GPUs of this machine: Ray Train starts a process on each, transformers' Trainer does the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from blockpruner.cluster.session import ray_session
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.model.loading import ModelSource, load_model
from blockpruner.engine.recovery import RecoveryConfig, train


def train_on_ray(
    source: ModelSource,
    dtype: str,
    rows: list[Tensor],
    config: RecoveryConfig,
    folder: Path,
    on_step: Callable[[int, int, float], None],
    *,
    num_workers: int,
    use_gpu: bool = True,
) -> None:
    """As `engine.recovery.train`, in `num_workers` processes that share the rows of each step between them."""
    with ray_session(None, num_cpus=num_workers, num_gpus=num_workers if use_gpu else 0):
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import WorkerGroupError
        from ray.util.queue import Queue

        steps = Queue(actor_options={"num_cpus": 0})
        what = {
            "source": source, "dtype": dtype, "rows": rows, "config": config, "folder": folder.resolve(),
            "steps": steps, "num_workers": num_workers, "device": "cuda" if use_gpu else "cpu",
        }  # fmt: skip
        trainer = TorchTrainer(
            _work,
            train_loop_config=what,
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            run_config=RunConfig(name="ray", storage_path=str(folder.resolve())),
        )
        failures: list[Exception] = []

        def fit() -> None:
            try:
                trainer.fit()
            except Exception as error:
                failures.append(error)
            finally:
                with suppress(Exception):  # Ray may be gone
                    steps.put(None)

        # Not in the main thread, where Ray Train would put a handler of its own in the place of our SIGINT's.
        threading.Thread(target=fit, daemon=True).start()
        while (step := steps.get()) is not None:
            on_step(*step)
        for failure in failures:
            causes = failure.worker_failures.values() if isinstance(failure, WorkerGroupError) else ()
            raise next((cause for cause in causes if isinstance(cause, SearchFailed)), failure)


def _work(what: dict[str, Any]) -> None:
    """In each process. The first one tells of the steps."""
    import ray.train

    is_first = ray.train.get_context().get_world_rank() == 0
    model = load_model(what["source"], what["dtype"], what["device"])
    on_step = (lambda *step: what["steps"].put(step)) if is_first else (lambda *step: None)
    train(model, what["rows"], what["config"], what["folder"], on_step, num_processes=what["num_workers"])
