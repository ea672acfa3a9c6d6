"""Whole functions with a model on a GPU that is not there: they give what they give on a CPU, and mix no places."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


SOME = ("compensate", "influence", "mistaken")


@cache
def found(*parts: str) -> dict[str, list[str]]:
    """What each part gave on the CPU, and on the fake GPU."""
    program = [sys.executable, "-m", "tests.engine.fake_gpu_with_data", *parts]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_parts: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return of_parts


@pytest.mark.parametrize(
    "parts", [SOME[:2], pytest.param(("kl", "channels", "refits"), marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_a_model_on_a_gpu_gives_what_it_gives_on_a_cpu(parts: tuple[str, ...]) -> None:
    of_parts = found(*(SOME if parts[0] in SOME else parts))
    for part in parts:
        on_cpu, on_gpu = of_parts[part]
        assert on_gpu == on_cpu
        assert "Error" not in on_cpu


def test_a_layer_that_is_left_on_the_cpu_would_be_noticed() -> None:
    assert "expected all tensors on one device" in found(*SOME)["mistaken"][1]
