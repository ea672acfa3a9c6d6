"""Attention or MLP: which should be removed if both quality and generation speed matter?

At one share of removed parameters, the lazy search runs with several limits on the number of MHA blocks, and then of
MLP blocks. An MHA block has fewer parameters than an MLP block, so removing more attention removes more blocks, and
leaves less to compute and to cache per token. Perplexity is measured on held-out text. Speed is that of generation with
a KV cache, 128 new tokens after a prompt of 64; the models take turns.

    python -m benchmarks.mha_mlp_balance --calibration alpaca.jsonl --held-out wiki.test.raw --out balance
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import pyplot as plt

from benchmarks.common import console, print_json, print_table, run_benchmark, spread_out
from benchmarks.memory import Memory, model_header
from blockpruner.engine.blocks import Granularity, Kind, Mask
from blockpruner.engine.calibration import calibration_windows, evaluation_windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.latency import generated_tokens_per_s
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_model, load_tokenizer, materialize
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.score import perplexity
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.engine.strategies.lazy import Lazy
from blockpruner.engine.work.units import kernel_shape
from blockpruner.showing.style import logarithmic, spans_scales

SEQ_LEN, HELD_OUT_WINDOWS = 256, 32
WORKLOAD = Workload(prompt_len=64, num_tokens=128)


def main(
    calibration: Annotated[str, typer.Option(help="As for search.")],
    held_out: Annotated[str, typer.Option(help="As --perplexity of evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for scores and the picture.")],
    ratio: float = 0.2,
    max_mha: Annotated[str, typer.Option(help="Limits on removed MHA blocks, one search each.")] = "0,4,8,12",
    max_mlp: Annotated[str, typer.Option(help="Limits on removed MLP blocks, one search each.")] = "2,4,6",
    model: str = "smollm2",
    dtype: str = "bfloat16",
    num_windows: int = 4,
    seed: int = 1,
    threads: int = 2,
    repeats: int = 5,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    source = materialize(ModelSource(model), dtype)
    tokenizer = load_tokenizer(source)
    dense = load_model(source, dtype)
    drawn = calibration_windows(
        Calibration(calibration=(calibration,), num_samples=256, seq_len=SEQ_LEN, seed=seed, num_windows=num_windows),
        tokenizer,
    )
    windows = evaluation_windows(held_out, tokenizer, seq_len=SEQ_LEN).tokens
    windows = spread_out(windows, HELD_OUT_WINDOWS)
    decoder = Decoder(dense)
    kernel = kernel_shape(decoder.shape, seq_len=SEQ_LEN, num_windows=num_windows, bytes_per_value=2, threads=threads)
    forked = ForkedPass(decoder, CallShape(sequences_per_call=kernel.rows, tokens_per_head_call=kernel.head_tokens))
    calibrated, judged = f"calibration-{seed}-{num_windows}.jsonl", f"judge-{Path(held_out).stem}.jsonl"
    made_of = model_header(source, dtype)
    memory = Memory(forked, decoder.shape, drawn.tokens, PPL, out / calibrated, made_of)
    judge = Memory(forked, decoder.shape, windows, PPL, out / judged, made_of)
    masks: dict[Mask, None] = {Mask(): None}
    limits = [
        (name, most)
        for name, numbers in (("max_mha", max_mha), ("max_mlp", max_mlp))
        for most in filter(None, numbers.split(","))
    ]
    for name, most in limits:
        limit: dict[str, Any] = {name: int(most)}
        try:
            space = SearchSpace(shape=decoder.shape, blocks=Granularity.MIX, budget=Budget(ratio=ratio), **limit)
        except UserError as error:
            console.print(f"{name} {most}: {error}")
            continue
        mask = Lazy(tolerance="1se").run(space, memory).mask
        masks.setdefault(mask)
        console.print(f"{name} {most}: {_count(mask, Kind.MHA)} MHA, {_count(mask, Kind.MLP)} MLP", highlight=False)
    if len(masks) == 1:
        raise UserError(f"expected a limit with which {ratio:.0%} can be removed, got {max_mha} and {max_mlp}.")
    values = [perplexity(score.value) for score in judge.score(list(masks))]
    models = [prune(dense, mask) if mask.absent else dense for mask in masks]
    speeds = generated_tokens_per_s(models, WORKLOAD, repeats=repeats)
    rows: list[dict[str, Any]] = [
        {
            "num_mha": _count(mask, Kind.MHA), "num_mlp": _count(mask, Kind.MLP), "ratio": decoder.shape.ratio(mask),
            "perplexity": value, "generated_tokens_per_s": speed, "speedup": speed / speeds[0], "mask": str(mask),
        }
        for mask, value, speed in zip(masks, values, speeds, strict=True)
    ]  # fmt: skip
    print_table(
        f"MHA/MLP balance at {ratio:.0%} of the parameters removed",
        ["MHA removed", "MLP removed", "parameters (%)", "held-out perplexity", "generated tokens/s", "speedup"],
        [[row["num_mha"], row["num_mlp"], 100 * row["ratio"], row["perplexity"], row["generated_tokens_per_s"],
          row["speedup"]] for row in rows],
    )  # fmt: skip
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.scatter([row["speedup"] for row in rows[1:]], [row["perplexity"] for row in rows[1:]], color="#2a6f97")
    middle = statistics.median(row["perplexity"] for row in rows[1:])
    for row in rows[1:]:  # above the upper points and below the lower ones, lest labels cover points
        axes.annotate(
            f"{row['num_mha']} + {row['num_mlp']}", (row["speedup"], row["perplexity"]), fontsize=8,
            xytext=(0, 7 if row["perplexity"] >= middle else -13), textcoords="offset points", ha="center",
        )  # fmt: skip
    axes.axhline(rows[0]["perplexity"], color="black", linewidth=1, linestyle=":", label="dense")
    axes.set(xlabel="generation speed / dense", ylabel="held-out perplexity",
             title=f"{ratio:.0%} of the parameters removed: MHA + MLP blocks")  # fmt: skip
    if spans_scales(values):
        logarithmic(axes)
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "mha_mlp_balance.png", dpi=150)
    print_json({"ratio": ratio, "rows": rows}, out / "mha_mlp_balance.json")


def _count(mask: Mask, kind: Kind) -> int:
    return sum(block.kind is kind for block in mask.absent)


if __name__ == "__main__":
    run_benchmark(main, resumable=True)
