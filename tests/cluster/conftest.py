"""What the tests of this folder share: one Ray as the program starts it, one run that nothing disturbed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cluster.config import SearchConfig
from cluster.progress import Reporter
from cluster.session import ray_session
from tests.cluster.processes import command, finish
from tests.conftest import tiny_llama, tiny_tokenizer

OPTIONS = {"seq_len": 16, "num_samples": 20, "dtype": "float32", "threads_per_replica": 1, "no_ray": True}


@pytest.fixture
def config(tiny_folder: Path, text_file: Path) -> Callable[..., SearchConfig]:
    def make(**options: Any) -> SearchConfig:
        return SearchConfig(**{"model": str(tiny_folder), "calibration": str(text_file), **OPTIONS, **options})

    return make


@pytest.fixture
def reporter(capsys: pytest.CaptureFixture[str]) -> Reporter:
    return Reporter(Console(width=200))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with ray_session(None, num_cpus=4):
        yield


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough that a step can be interrupted."""
    folder = tmp_path_factory.mktemp("models") / "slow"
    model = tiny_llama(
        torch.float32, num_hidden_layers=10, hidden_size=128, intermediate_size=256, initializer_range=0.08
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finish(command(slow_model, tmp_path_factory.mktemp("undisturbed") / "run", "--no-ray"))
