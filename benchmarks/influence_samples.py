"""How many calibration samples do block influence and relative magnitude need? (Figure 9 of the paper)

Both are means over tokens from a single pass, so a thousand samples are cheap. For each number of samples the blocks
with the lowest values are removed at once, and the remaining model is evaluated on held-out text.

    python -m benchmarks.influence_samples --calibration alpaca.jsonl --held-out wiki.test.raw --out influence
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import pyplot as plt
from rich.progress import track

from benchmarks.common import console, print_json, print_table, run_benchmark
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.calibration import calibration_windows, evaluation_windows
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_model, load_tokenizer, materialize
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.showing.style import logarithmic, spans_scales

HELD_OUT_WINDOWS, HELD_OUT_TOKENS = 32, 256


def main(
    calibration: Annotated[str, typer.Option(help="As for search.")],
    held_out: Annotated[str, typer.Option(help="As --perplexity of evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for the picture.")],
    samples: Annotated[str, typer.Option(help="Numbers of samples, comma-separated.")] = "8,16,32,64,128,256,512,1000",
    num_remove: int = 12,
    seed: int = 1,
    model: str = "smollm2",
    dtype: str = "bfloat16",
    seq_len: int = 128,
    threads: int = 2,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    source = materialize(ModelSource(model), dtype)
    tokenizer = load_tokenizer(source)
    dense = load_model(source, dtype)
    decoder = Decoder(dense)
    judge = evaluation_windows(held_out, tokenizer, seq_len=HELD_OUT_TOKENS).tokens[:HELD_OUT_WINDOWS]
    blocks = Granularity.MIX.candidates(decoder.shape.num_layers)
    rows: list[dict[str, Any]] = []
    known: dict[Mask, float] = {}
    for number in track([int(number) for number in samples.split(",")], "samples", console=console):
        windows = calibration_windows(
            Calibration(calibration=(calibration,), num_samples=number, seq_len=seq_len, seed=seed), tokenizer
        )
        found = measure_influence(decoder, windows.tokens)
        for name, values in (("BI", found.block_influence), ("RM", found.relative_magnitude)):
            mask = Mask.of(sorted(blocks, key=values.__getitem__)[:num_remove])
            if mask not in known:
                known[mask] = evaluate_perplexity(prune(dense, mask), judge).value
            rows.append(
                {
                    "metric": name, "samples": number, "num_tokens": windows.tokens.numel(), "mask": mask,
                    "ratio": decoder.shape.ratio(mask), "perplexity": known[mask],
                }
            )  # fmt: skip
    last = {row["metric"]: row["mask"] for row in rows}
    for row in rows:
        row["num_as_last"] = len(row["mask"].absent & last[row["metric"]].absent)
        row["mask"] = str(row["mask"])
    print_table(
        f"{num_remove} blocks with the lowest values removed at once",
        ["metric", "samples", "tokens", "removed (%)", "held-out perplexity", "blocks as with most samples"],
        [
            [
                row["metric"],
                row["samples"],
                row["num_tokens"],
                100 * row["ratio"],
                row["perplexity"],
                row["num_as_last"],
            ]
            for row in rows
        ],
    )
    figure, axes = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for name in last:
        mine = [row for row in rows if row["metric"] == name]
        axes.plot([row["samples"] for row in mine], [row["perplexity"] for row in mine], marker="o", label=name)
    axes.set(xscale="log", xlabel="calibration samples", ylabel="held-out perplexity",
             title=f"{num_remove} blocks removed at once")  # fmt: skip
    if spans_scales([row["perplexity"] for row in rows]):
        logarithmic(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "influence_samples.png", dpi=150)
    print_json({"rows": rows}, out / "influence_samples.json")


if __name__ == "__main__":
    run_benchmark(main)
