"""Does everything work on a GPU, and how fast? One command, without a network.

    python -m benchmarks.gpu                               # under 8 minutes on one H100 or RTX 4090
    python -m benchmarks.gpu --only right --only fast
    python -m benchmarks.gpu --device cpu --model random-tiny --large random-tiny --seq-len 64    # tries the benchmark

Random models of the shapes of TinyLlama (1B) and Llama-2-7B need no files; their weights are made on the device. Each
part runs in a process of its own with its own time limit. A table after each says what is promised and what was seen.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import console, print_json, print_table, run_benchmark
from benchmarks.gpu.models import SHAPES, write
from benchmarks.gpu.part import Setting, run_part
from blockpruner.engine.errors import UserError

LIMITS_S = {"right": 80.0, "fast": 110.0, "robust": 120.0, "whole": 150.0}
"""Parts, in their order, and the time that each may take on a GPU, beside what earlier ones have left of theirs."""
CPU_LIMIT_S = 900.0
TOLD = {True: "kept", False: "BROKEN", None: "not tried"}


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}, a folder, or smollm2.")] = "random-1b",
    large: Annotated[str, typer.Option(help="Random model of the timings that need no files.")] = "random-7b",
    only: Annotated[list[str] | None, typer.Option(help=f"Part: {', '.join(LIMITS_S)}. May be repeated.")] = None,
    dtype: str = "bfloat16",
    device: str = "cuda",
    seq_len: int = 2048,
    out: Annotated[Path | None, typer.Option(help="File for the last JSON line, too.")] = None,
) -> None:
    if wrong := sorted({*(only or [])} - {*LIMITS_S}):
        raise UserError(f"expected parts of {', '.join(LIMITS_S)} for `only`, got {wrong[0]!r}.")
    if large not in SHAPES:
        raise UserError(f"expected `large` to be one of {', '.join(SHAPES)}, got {large!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"expected a GPU that torch {torch.__version__} can use, found none; `device=cpu` with small models tries "
            f"the benchmark itself."
        )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    console.print(f"{name}, {model}, {dtype}, windows of {seq_len} tokens", style="bold")
    figures: dict[str, Any] = {"device": name, "model": model, "large": large, "dtype": dtype, "seq_len": seq_len}
    num_broken = 0
    with tempfile.TemporaryDirectory() as work:
        setting = Setting(model, large, dtype, device, seq_len, Path(work))
        write(model, dtype, device, setting.dense, setting.text)
        if device == "cuda":
            torch.cuda.empty_cache()
        left_s = 0.0
        for part, limit_s in LIMITS_S.items():
            if only and part not in only:
                continue
            left_s += limit_s if device == "cuda" else CPU_LIMIT_S
            report, seconds = run_part(part, setting, left_s)
            left_s = max(0.0, left_s - seconds)
            print_table(  # now, so that it is not lost with this process
                f"{part}, {seconds:.0f} s",
                ["", "promised", "seen", "verdict"],
                [[one.what, one.promised, one.seen, TOLD[one.is_kept]] for one in report.promises],
            )
            num_broken += sum(one.is_kept is False for one in report.promises)
            figures[part] = {**report.figures, "promises": [asdict(one) for one in report.promises], "seconds": seconds}
    print_json({**figures, "broken": num_broken}, out)
    if num_broken:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_benchmark(main)
