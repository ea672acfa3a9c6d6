"""What all benchmarks share: the command, the machine's description and the JSON line."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from blockpruner.cli.app import errors_in_one_line
from blockpruner.engine.model.loading import DTYPES
from blockpruner.files import plain, write_json

console = Console(width=None if sys.stdout.isatty() else 120)


def run_benchmark(main: Callable[..., None], *, resumable: bool = False) -> None:
    """Run the benchmark as a command, with the error handling and exit codes of `blockpruner`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(errors_in_one_line(resumable=resumable)(main))
    app()


def spread_out(windows: Tensor, number: int) -> Tensor:
    """Return N of the windows, evenly spaced over the text."""
    return windows[:: max(1, len(windows) // number)][:number]


def random_1b(dtype: str) -> PreTrainedModel:
    """Return a random model of TinyLlama's shape (1.1 billion parameters), the same on every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"  # a number that is cut is another number
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)


def print_json(figures: dict[str, Any], file: Path | None = None) -> None:
    """Print the figures, the versions and the machine as one JSON line, with null for what is not finite. file: where
    to write it as well."""
    told = plain({**figures, "setup": _setup()})
    if file is not None:
        write_json(file, told)
    print(json.dumps(told, allow_nan=False))


def stdev(values: Sequence[float]) -> float:
    """Return the sample standard deviation of at least two values, or NaN if one is not finite (`statistics.stdev`
    would raise an AttributeError)."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _setup() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        **{package: version(package) for package in ("blockpruner", "torch", "transformers", "ray")},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
