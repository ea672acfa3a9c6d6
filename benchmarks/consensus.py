"""Does scoring on several draws of the calibration text choose better than as many windows of one draw?

Whole layers are removed, by a search on each draw alone, on one draw of as many windows, and on all draws together,
where the candidate wins that has the lowest mean loss, the lowest mean rank over the draws, or the lowest loss in the
draw that it harms most. All models are refitted on the same text and judged on held-out texts.

    python -m benchmarks.consensus --calibration alpaca.jsonl --calibration wikitext2_validation.parquet \\
        --held-out wiki.test.raw --draws 42,1,2 --out consensus
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from scipy import stats

import blockpruner as bp
from benchmarks.common import print_json, print_table, run_benchmark
from benchmarks.recipe_tables import mean
from benchmarks.recipes import FIT, Draw, nlls, texts_to_judge_by
from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.search.oracle import Found, Oracle, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy


class Consensus(Strategy):
    """Greedy search in which the draws vote. Each has as many windows; they follow one another."""

    name = "consensus"
    about = "greedy search in which several draws of the text vote"

    rule: Literal["rank", "worst"]
    num_draws: int

    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        base, steps = oracle.dense, list[Step]()
        while candidates := space.candidates(base.mask):
            scores = oracle.score([candidate.mask for candidate in candidates])
            sums = np.array([score.window_sums for score in scores]) - np.array(base.window_sums)
            of_draws = sums.reshape(len(scores), self.num_draws, -1).mean(axis=2)
            votes = stats.rankdata(of_draws, axis=0).mean(axis=1) if self.rule == "rank" else of_draws.max(axis=1)
            best = min(range(len(scores)), key=lambda index: (votes[index], scores[index].value))
            step = Step(block=candidates[best].block, score=scores[best], candidates=candidates, scores=scores)
            steps.append(step)
            base = oracle.removed(step)
        return Found.by(steps)

    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        return space.greedy_flops_left(mask, num_tokens)


def main(
    calibration: Annotated[list[str], typer.Option(help="As for search.")],
    held_out: Annotated[list[str], typer.Option(help="As --perplexity of evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for the table.")],
    draws: Annotated[str, typer.Option(help="Seeds.")] = "42,1,2",
    ratio: float = 0.2,
    windows: Annotated[int, typer.Option(help="Of each draw.")] = 4,
    fit_windows: int = 36,
    held_out_windows: int = 24,
    model: str = "smollm2",
    dtype: str = "bfloat16",
    threads: int = 1,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    dense, tokenizer = bp.load(model, dtype=dtype)
    seeds = [int(seed) for seed in draws.split(",")]

    def drawn(seed: int, number: int) -> Draw:
        return Draw(dense, dense, tokenizer, calibration, seed, number, fit_windows, ratio, threads)

    each = [drawn(seed, windows).text for seed in seeds]
    larger = drawn(seeds[0], windows * len(seeds))
    together = Windows(torch.cat([one.tokens for one in each]), sum(one.num_rows for one in each))
    searches: dict[str, tuple[Windows, str | Strategy]] = {
        **{f"draw {seed} alone": (one, "lazy") for seed, one in zip(seeds, each, strict=True)},
        f"draw {seeds[0]}, as many windows": (larger.text, "lazy"),
        "all draws, mean loss": (together, "lazy"),
        "all draws, mean rank": (together, Consensus(rule="rank", num_draws=len(seeds))),
        "all draws, loss in the worst": (together, Consensus(rule="worst", num_draws=len(seeds))),
    }
    tests = texts_to_judge_by(held_out, tokenizer, held_out_windows)
    rows: list[dict[str, Any]] = []
    for name, (text, strategy) in searches.items():
        found = bp.search(dense, text, ratio=ratio, strategy=strategy, blocks="layer", threads_per_replica=threads)
        small = bp.prune(dense, found.order)
        pruned = nlls(small, tests)
        refitted = nlls(bp.compensate(small, dense, larger.fit_text, **FIT), tests)
        blocks = [str(block) for block in found.order]
        rows.append({"search": name, "blocks": blocks, "pruned": pruned, "refitted": refitted})
        print(name, *blocks, flush=True)
    kinds = ("pruned", "refitted")
    print_table(
        f"Whole layers, {ratio:.0%} of the parameters",
        ["search", *[f"{text}, {kind}" for text in tests for kind in kinds], "layers"],
        [
            [
                row["search"],
                *[f"{math.exp(mean(row[kind][text])):.1f}" for text in tests for kind in kinds],
                " ".join(sorted((block.split(".")[1] for block in row["blocks"]), key=int)),
            ]
            for row in rows
        ],
    )
    print_json({"rows": rows}, out / f"{draws.replace(',', '-')}.json")


if __name__ == "__main__":
    run_benchmark(main)
