"""Trains on several GPUs of this machine: Ray Train starts one process per GPU, and each runs transformers' Trainer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from blockpruner.cluster.session import ray_session
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.model.loading import load_model
from blockpruner.engine.recovery.config import RecoveryConfig
from blockpruner.engine.recovery.teacher import load_teacher
from blockpruner.engine.recovery.training import train
from blockpruner.engine.sections import ModelSource


def train_on_ray(
    source: ModelSource,
    dtype: str,
    rows: list[Tensor],
    config: RecoveryConfig,
    folder: Path,
    on_step: Callable[[int, int, float], None],
    *,
    num_workers: int,
    say: Callable[[str], None] = lambda text: None,
    projections: Collection[str] = (),
    teacher: ModelSource | None = None,
    use_gpu: bool = True,
) -> None:
    """Like `engine.recovery.train`, but `num_workers` processes share the rows of each step, and each loads its own
    teacher."""
    with ray_session(None, num_cpus=num_workers, num_gpus=num_workers if use_gpu else 0, say=say):
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import WorkerGroupError
        from ray.util.queue import Queue

        steps = Queue(actor_options={"num_cpus": 0})
        what = {
            "source": source, "dtype": dtype, "rows": rows, "config": config, "folder": folder.resolve(),
            "steps": steps, "num_workers": num_workers, "teacher": teacher, "projections": projections,
            "device": "cuda" if use_gpu else "cpu",
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
                with suppress(Exception):  # Ray may have shut down
                    steps.put(None)

        # In the main thread Ray Train would replace our SIGINT handler with its own.
        threading.Thread(target=fit, daemon=True).start()
        while (step := steps.get()) is not None:
            on_step(*step)
        for failure in failures:
            causes = failure.worker_failures.values() if isinstance(failure, WorkerGroupError) else ()
            raise next((cause for cause in causes if isinstance(cause, SearchFailed)), failure)


def _work(what: dict[str, Any]) -> None:
    """Train in one worker process. The worker with rank 0 reports the steps."""
    import ray.train

    is_first = ray.train.get_context().get_world_rank() == 0
    model = load_model(what["source"], what["dtype"], what["device"])
    on_step = (lambda *step: what["steps"].put(step)) if is_first else (lambda *step: None)
    held = None
    if what["teacher"] is not None:
        held = load_teacher(what["teacher"], what["dtype"], model.device)
    train(
        model, what["rows"], what["config"], what["folder"], on_step, projections=what["projections"], teacher=held,
        num_processes=what["num_workers"],
    )  # fmt: skip
