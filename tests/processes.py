"""Searches as a user runs them, in processes of their own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


def facts(summary: dict[str, Any], num_steps: int | None = None) -> Any:
    """What must not depend on where and in how many sessions a run was done; of the first steps."""
    kept = ("step", "block", "nll", "perplexity", "ratio", "num_candidates", "num_scored", "naive_work_flops")
    steps = [{key: step[key] for key in kept} for step in summary["steps"][:num_steps]]
    return summary["dense"], steps, summary["calibration"], summary["kernel"]


def command(model: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "blockpruner", "search", str(model), "--out", str(out), "--calibration", "builtin",
        "--num-samples", "6", "--seq-len", "64", "--num-windows", "40", "--num-remove", "3", "--dtype", "float32",
        "--threads-per-replica", "1", *options,
    ]  # fmt: skip


def finish(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([*arguments, "--json"], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not come to that; stderr: {process.communicate()[1]}")
        time.sleep(0.02)


def num_units(run: Path, step: int) -> int:
    ledger = run / "ledger.jsonl"
    return ledger.read_text().count(f'"type": "unit", "step": {step},') if ledger.exists() else 0
