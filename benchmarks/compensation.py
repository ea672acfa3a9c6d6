"""How much does compensation give back, by method and by what was removed?

Each mask (a run directory, or a removal order in the official format) is cut at some ratios. The model is judged
without compensation and after each method, window by window on held-out texts.

    python -m benchmarks.compensation --mask run --mask shortgpt.json --calibration alpaca.jsonl \\
        --calibration wikitext2 --held-out wiki.test.raw --ratio 0.2,0.25,0.3 --out compensated
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy import stats
from transformers import PreTrainedModel

import blockpruner as bp
from benchmarks.common import print_json, print_table, run_benchmark
from blockpruner.engine.calibration import Windows
from blockpruner.engine.judge.evaluation import mean_nll

PRUNED = "pruned"


def main(
    mask: Annotated[list[str], typer.Option(help="Run directory, or removal order in the official format.")],
    calibration: Annotated[list[str], typer.Option(help="As for compensate.")],
    held_out: Annotated[list[str], typer.Option(help="As --perplexity of evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for the table.")],
    ratio: Annotated[
        str, typer.Option(help="Shares of the parameters to remove at least; empty for whole masks.")
    ] = "",
    method: str = "auto",
    model: str = "smollm2",
    num_samples: int = 400,
    seq_len: int = 256,
    num_windows: int = 112,
    held_out_windows: int = 24,
    seed: int = 42,
    threads: int = 2,
    dtype: str = "float32",
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    dense, tokenizer = bp.load(model, dtype=dtype)
    text = bp.calibration(
        calibration, tokenizer, num_samples=num_samples, seq_len=seq_len, num_windows=num_windows, seed=seed
    )
    tests = {
        source: bp.test_text(source, tokenizer, seq_len=seq_len, num_windows=held_out_windows) for source in held_out
    }
    of_dense = _nlls(dense, tests)
    rows: list[dict[str, Any]] = [{"mask": "", "ratio": 0.0, "name": "dense", "seconds": None, **_numbers(of_dense)}]
    for one in mask:
        for small in _cut(dense, one, [float(part) for part in ratio.split(",") if part]):
            share = 1 - small.num_parameters() / dense.num_parameters()
            before = _nlls(small, tests)
            rows.append({"mask": one, "ratio": share, "name": PRUNED, "seconds": None, **_numbers(before)})
            for name in method.split(","):
                start = time.monotonic()
                made = bp.compensate(small, dense, text, method=name)
                seconds = time.monotonic() - start
                after = _nlls(made, tests)
                given_back = {
                    f"{source} given back": _share(of_dense[source], before[source], after[source]) for source in tests
                }
                rows.append(
                    {"mask": one, "ratio": share, "name": name, "seconds": seconds, **_numbers(after), **given_back}
                )
                print_table("So far", *_table(rows, held_out))
    print_json({"rows": rows, "fit_tokens": text.tokens.numel()}, out / "compensation.json")


def _cut(dense: PreTrainedModel, mask: str, ratios: list[float]) -> list[PreTrainedModel]:
    """Return the model without the fewest blocks that make up each ratio, or without all of them."""
    if not ratios:
        return [bp.prune(dense, mask)]
    found, number = [], 0
    for ratio in sorted(ratios):
        while True:
            number += 1
            small = bp.prune(dense, mask, num_remove=number)
            if 1 - small.num_parameters() / dense.num_parameters() >= ratio:
                found.append(small)
                break
    return found


def _nlls(model: PreTrainedModel, tests: dict[str, Windows]) -> dict[str, list[float]]:
    return {source: [mean_nll(model, window) for window in windows.tokens] for source, windows in tests.items()}


def _numbers(nlls: dict[str, list[float]]) -> dict[str, float]:
    return {source: math.exp(math.fsum(values) / len(values)) for source, values in nlls.items()}


def _share(dense: list[float], pruned: list[float], compensated: list[float]) -> dict[str, float]:
    """Return the share of the lost log-likelihood that is given back, and a paired 95 % interval over windows of the
    gain in nats."""
    gains = [before - after for before, after in zip(pruned, compensated, strict=True)]
    lost = math.fsum(pruned) - math.fsum(dense)
    mean = math.fsum(gains) / len(gains)
    half = stats.sem(gains) * stats.t.ppf(0.975, len(gains) - 1)
    return {"share": math.fsum(gains) / lost, "nats": mean, "low": mean - half, "high": mean + half}


def _table(rows: list[dict[str, Any]], texts: list[str]) -> tuple[list[str], list[list[Any]]]:
    head = [
        "removed by",
        "ratio",
        "",
        *(Path(text).stem for text in texts),
        *(f"{Path(text).stem} back" for text in texts),
        "s",
    ]
    body = []
    for row in rows:
        back = [row.get(f"{text} given back") for text in texts]
        body.append(
            [
                Path(row["mask"]).name,
                f"{row['ratio']:.1%}",
                row["name"],
                *(f"{row[text]:.2f}" for text in texts),
                *("" if one is None else f"{one['share']:.0%}" for one in back),
                "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            ]
        )
    return head, body


if __name__ == "__main__":
    run_benchmark(main)
