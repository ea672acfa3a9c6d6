"""What lies in the folder in which a command runs must not hide installed packages, neither here nor in actors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAPS = ("engine.py", "cluster/__init__.py", "torch.py", "numpy.py", "transformers.py", "ray.py", "datasets.py")


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    for name in TRAPS:
        file = tmp_path / "work" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"raise ImportError('this is not the installed {name}')\n")
    return tmp_path / "work"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(["-m", "blockpruner"], marks=pytest.mark.slow),
        [str(Path(sys.executable).with_name("blockpruner"))],
    ],
)
def test_a_search_on_two_replicas_runs_in_a_folder_full_of_traps(
    trapped: Path, tiny_folder: Path, text_file: Path, program: list[str]
) -> None:
    done = subprocess.run(
        [
            sys.executable, *program, "search", tiny_folder, "--calibration", text_file, "--seq-len", "16",
            "--num-samples", "20", "--dtype", "float32", "--num-remove", "1", "--replicas", "2",
            "--out", "run", "--json",
        ],
        capture_output=True, text=True, cwd=trapped, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["status"], found["num_replicas"]) == ("finished", 2)
