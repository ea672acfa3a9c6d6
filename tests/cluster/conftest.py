"""What the tests of this folder share: one Ray as the program starts it, one run that nothing disturbed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.session import ray_session
from tests.cluster.processes import command, finish
from tests.conftest import tiny_llama, tiny_tokenizer


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
