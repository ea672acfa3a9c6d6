"""Which strategy finds the mask that does best on held-out text?

All strategies search on the same draw of the calibration text. Their masks are compared at equal shares of removed
parameters, on the last windows of the same draw (which were not used for calibration) and on any other texts. Scores
are stored in --out, so a mask that two strategies ask for is scored once, but counts as work for both. Run it once per
seed; the picture shows all seeds in --out.

    python -m benchmarks.better_masks --calibration alpaca.jsonl --held-out wiki.test.raw --seed 1 --out masks
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import pyplot as plt

from benchmarks.common import console, print_json, print_table, run_benchmark, spread_out, stdev
from benchmarks.kept import Kept, kept_lines
from benchmarks.memory import Memory, model_header
from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.calibration import Windows, calibration_windows, evaluation_windows
from blockpruner.engine.metrics.js import Js
from blockpruner.engine.metrics.kl import Kl
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_model, load_tokenizer, materialize
from blockpruner.engine.options import check_name
from blockpruner.engine.score import perplexity
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.search.budget import Budget, Per
from blockpruner.engine.search.oracle import Found
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.engine.strategies.evolution import Evolution
from blockpruner.engine.strategies.lazy import Lazy
from blockpruner.engine.strategies.one_shot import OneShot
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import kernel_shape
from blockpruner.showing.style import logarithmic

SEQ_LEN = 256
HELD_OUT_WINDOWS = 40


def equal_counts(space: Callable[..., SearchSpace], ratio: float, shape: ModelShape) -> SearchSpace:
    """EvoPress's rule: remove as many attention blocks as MLP blocks, the smallest number that reaches the ratio."""
    pair = space(ratio).size(Block(Kind.MHA, 0)) + space(ratio).size(Block(Kind.MLP, 0))
    number = math.ceil(ratio * shape.num_parameters / pair)
    return space(None, num_remove=2 * number, max_mha=number, max_mlp=number)


def main(
    calibration: Annotated[str, typer.Option(help="As for search.")],
    held_out: Annotated[list[str], typer.Option(help="As --perplexity of evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for scores, results and the picture.")],
    seed: int = 1,
    model: str = "smollm2",
    dtype: str = "bfloat16",
    ratio: Annotated[list[float] | None, typer.Option()] = None,
    num_windows: int = 8,
    methods: str = "one-shot,layer,greedy,per-params,evolution,greedy-kl,equal-counts",
    generations: int = 20,
    offspring: int = 24,
    threads: int = 1,
    report_only: bool = False,
) -> None:
    ratios = list(dict.fromkeys(ratio or [0.2, 0.3, 0.4]))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    source = materialize(ModelSource(model), dtype)
    tokenizer = load_tokenizer(source)
    drawn = calibration_windows(
        Calibration(calibration=(calibration,), num_samples=256, seq_len=SEQ_LEN, seed=seed), tokenizer
    ).tokens
    texts = {"calibration": drawn[:num_windows], "other rows": drawn[-HELD_OUT_WINDOWS:]}
    for text in held_out:
        windows = evaluation_windows(text, tokenizer, seq_len=SEQ_LEN).tokens
        texts[Path(text).stem] = spread_out(windows, HELD_OUT_WINDOWS)
    made_of = model_header(source, dtype)
    about = {
        **made_of, "num_windows": num_windows, "generations": generations, "offspring": offspring,
        "held_out": {Path(text).stem: Windows(texts[Path(text).stem], 0).fingerprint for text in held_out},
    }  # fmt: skip
    results = Kept(out / f"results-{seed}.jsonl", {**about, "windows": Windows(drawn, 0).fingerprint})
    known: list[dict[str, Any]] = [*results.lines]
    all_rows(out, about)  # what cannot stand in one picture is told before the first search
    decoder = Decoder(load_model(source, dtype))
    shape = decoder.shape
    kernel = kernel_shape(shape, seq_len=SEQ_LEN, num_windows=num_windows, bytes_per_value=2, threads=threads)
    forked = ForkedPass(decoder, CallShape(sequences_per_call=kernel.rows, tokens_per_head_call=kernel.head_tokens))

    def oracle(metric: Metric = PPL, num: int = num_windows) -> Memory:
        name = f"{metric.name}-{num}-{seed}.jsonl"
        return Memory(forked, shape, drawn[:num], metric, out / name, made_of)

    def space(ratio: float | None, blocks: Granularity = Granularity.MIX, **limits: Any) -> SearchSpace:
        num_remove = limits.pop("num_remove", None)
        return SearchSpace(shape=shape, blocks=blocks, budget=Budget(ratio=ratio, num_remove=num_remove), **limits)

    # Those that remove one block after the other are searched once, for the largest ratio.
    in_order: dict[str, Callable[[], tuple[Strategy, SearchSpace, Memory]]] = {
        "one-shot": lambda: (OneShot(), space(max(ratios)), oracle()),
        "layer": lambda: (Lazy(), space(max(ratios), Granularity.LAYER), oracle()),
        "greedy": lambda: (Lazy(), space(max(ratios)), oracle()),
        "greedy-1se": lambda: (Lazy(tolerance="1se"), space(max(ratios)), oracle()),
        "greedy-kl": lambda: (Lazy(), space(max(ratios)), oracle(Kl())),
        "greedy-js": lambda: (Lazy(), space(max(ratios)), oracle(Js())),
        "per-params": lambda: (Lazy(), space(max(ratios), per=Per.PARAMS), oracle()),
        "greedy-4x": lambda: (Lazy(tolerance="1se"), space(max(ratios)), oracle(num=4 * num_windows)),
    }
    evolution = Evolution(generations=generations, offspring=offspring)
    at_once: dict[str, Callable[[float], tuple[Strategy, SearchSpace, Memory]]] = {
        "evolution": lambda ratio: (evolution, space(ratio), oracle()),
        "evolution-kl": lambda ratio: (evolution, space(ratio), oracle(Kl())),
        "equal-counts": lambda ratio: (evolution, equal_counts(space, ratio, shape), oracle()),
    }
    for method in methods.split(","):
        check_name([*in_order, *at_once], "methods", method)
    judge = {name: Memory(forked, shape, windows, PPL, out / f"judge-{name}-{seed}.jsonl", made_of)
             for name, windows in texts.items()}  # fmt: skip

    def record(method: str, ratio: float, mask: Mask, work_flops: float, wall_s: float) -> None:
        values = {name: perplexity(memory.score([mask])[0].value) for name, memory in judge.items()}
        naive = num_windows * sum(
            shape.forward_flops(candidate.mask, SEQ_LEN) for base in greedy_bases(ratio) for candidate in base
        )
        row = {
            "seed": seed, "method": method, "target": ratio, "ratio": shape.ratio(mask), "perplexity": values,
            "num_mha": sum(block.kind is Kind.MHA for block in mask.absent), "num_blocks": len(mask.absent),
            "work_share": work_flops / naive, "wall_s": wall_s, "mask": str(mask),
        }  # fmt: skip
        known.append(row)
        results.append([row])
        console.print(f"{method} {ratio}: {row['ratio']:.4f} {values}", highlight=False)

    def greedy_bases(ratio: float) -> list[Any]:
        """Return the candidates of each step of the plain greedy search, whose naive work is the reference."""
        mask, bases = Mask(), []
        while candidates := space(ratio).candidates(mask):
            bases.append(candidates)
            mask = candidates[len(candidates) // 2].mask
        return bases

    def done(method: str, ratio: float) -> bool:
        return any(row["method"] == method and row["target"] == ratio for row in known)

    for method in [] if report_only else methods.split(","):
        started = time.perf_counter()
        missing = [target for target in ratios if not done(method, target)]
        if method in in_order and missing:
            strategy, searched, memory = in_order[method]()
            found = strategy.run(searched, memory, seed=seed)
            for target in missing:
                mask = first_at(found, target, shape)
                number = sum(shape.ratio(Mask.of(found.blocks[:n])) < target for n in range(1, len(found.blocks) + 1))
                work_flops = memory.work_at[number] if memory.work_at else memory.work_flops
                record(method, target, mask, work_flops, time.perf_counter() - started)
        if method in at_once:
            for target in missing:
                strategy, searched, memory = at_once[method](target)
                started = time.perf_counter()
                found = strategy.run(searched, memory, seed=seed)
                record(method, target, found.mask, memory.work_flops, time.perf_counter() - started)
    report(out, about, list(texts))


def first_at(found: Found, ratio: float, shape: ModelShape) -> Mask:
    """Return the first mask along the removals that reaches the ratio."""
    masks = (Mask.of(found.blocks[:number]) for number in range(1, len(found.blocks) + 1))
    return next(mask for mask in masks if shape.ratio(mask) >= ratio)


def all_rows(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of all seeds. Raises UserError if some were computed from something other than `about`."""
    return [row for file in sorted(out.glob("results-*.jsonl")) for row in kept_lines(file, about)]


def report(out: Path, about: dict[str, Any], texts: list[str]) -> None:
    rows = all_rows(out, about)
    table = []
    summary = []
    for target in sorted({row["target"] for row in rows}):
        greedy = {row["seed"]: row for row in rows if (row["method"], row["target"]) == ("greedy", target)}
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if (row["method"], row["target"]) == (method, target)]
            if not mine:
                continue
            cells: list[Any] = []
            for text in texts:
                values = [row["perplexity"][text] for row in mine]
                spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
                paired = [
                    row["perplexity"][text] / greedy[row["seed"]]["perplexity"][text] - 1
                    for row in mine
                    if row["seed"] in greedy
                ]
                change = f" ({100 * statistics.mean(paired):+.1f} %)" if paired else ""
                cells.append(f"{statistics.mean(values):.2f}{spread}{change}")
                summary.append(
                    {"target": target, "method": method, "text": text, "perplexity": values, "change": paired}
                )
            removed = statistics.mean(row["ratio"] for row in mine)
            share = statistics.mean(row["work_share"] for row in mine)
            mha = statistics.mean(row["num_mha"] for row in mine)
            mlp = statistics.mean(row["num_blocks"] for row in mine) - mha
            table.append([f"{target:.0%} {method}", len(mine), f"{removed:.3f}", f"{mha:.0f}+{mlp:.0f}", *cells, share])
    print_table(
        "Perplexity (mean ± sd over draws; change against greedy in the same draw)",
        ["", "draws", "removed", "MHA+MLP", *texts, "work / naive greedy"],
        table,
    )
    draw(rows, texts, out / "better_masks.png")
    print_json({"rows": summary}, out / "better_masks.json")


def draw(rows: list[dict[str, Any]], texts: list[str], path: Path) -> None:
    """Draw perplexity against removed parameters: one panel per text, mean and range over draws."""
    figure, panels = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4), layout="constrained", squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            targets = sorted({row["target"] for row in rows if row["method"] == method})
            mine = [[row for row in rows if (row["method"], row["target"]) == (method, target)] for target in targets]
            values = [[row["perplexity"][text] for row in some] for some in mine]
            x = [100 * statistics.mean(row["ratio"] for row in some) for some in mine]
            mean = [statistics.mean(some) for some in values]
            axes.errorbar(
                x,
                mean,
                yerr=[[m - min(v) for m, v in zip(mean, values, strict=True)],
                      [max(v) - m for m, v in zip(mean, values, strict=True)]],
                marker="o", markersize=4, capsize=3, label=method,
            )  # fmt: skip
        axes.set(xlabel="parameters removed (%)", ylabel="perplexity", title=text)
        logarithmic(axes)
        axes.grid(alpha=0.3, which="both")
    panels[0][0].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_benchmark(main, resumable=True)
