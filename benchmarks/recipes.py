"""Which way to a smaller model is the best one, at equal parameters and at equal measured speed?

Each recipe removes blocks until a share of the parameters is gone, or until generating is faster by a factor. Its
models are judged window by window on held-out texts as they are, and with the output projections refitted. One call is
one draw of the calibration text; it goes on where it was stopped. Other draws go to the same folder, and
`--report-only` makes the tables of all of them.

    python -m benchmarks.recipes --model smollm2 --calibration alpaca.jsonl --calibration wikitext2 \\
        --held-out wiki.test.raw --held-out alpaca_rest.jsonl --ratio 0.1,0.2,0.3 --seed 42 --out recipes

For a speed, `blockpruner times` measures what the blocks cost (`--times`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import blockpruner as bp
from benchmarks.common import run_benchmark
from benchmarks.recipe_tables import mean, report
from blockpruner.engine.blocks import Block, Granularity, Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.judge.evaluation import mean_nll
from blockpruner.engine.judge.latency import generated_tokens_per_s
from blockpruner.engine.judge.workload import REPEATS, Workload
from blockpruner.engine.methods.block_influence import Influence, measure_influence
from blockpruner.engine.methods.fewer_layers import num_layers_for_ratio
from blockpruner.engine.methods.prune_and_comp import prune_and_comp
from blockpruner.engine.methods.replaceme import replaceme
from blockpruner.engine.methods.slicegpt import slicegpt, sparsity_for_ratio
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.times_file import read_times, times_of
from blockpruner.files import write_json

SEARCH_ROWS, SEARCH_LEN = 100, 128
FIT_ROWS, FIT_LEN = 400, 256
FIT: dict[str, Any] = {"method": "both", "ridge": 0.1}


@dataclass
class Draw:
    """The dense model, and one draw of the calibration text."""

    dense: PreTrainedModel
    """Is pruned, refitted and judged."""
    searched: PreTrainedModel
    """The same model in the dtype in which it is searched and generates."""
    tokenizer: PreTrainedTokenizerBase
    calibration: list[str]
    seed: int
    search_windows: int
    fit_windows: int
    most: float
    """Largest share of the parameters that a removal order is needed for."""
    threads: int
    times: Path | None = None
    """What `blockpruner times` wrote."""

    @cached_property
    def text(self) -> Windows:
        """What the recipes choose by."""
        return bp.calibration(
            self.calibration, self.tokenizer, num_samples=SEARCH_ROWS, seq_len=SEARCH_LEN,
            num_windows=self.search_windows, seed=self.seed,
        )  # fmt: skip

    @cached_property
    def fit_text(self) -> Windows:
        return bp.calibration(
            self.calibration, self.tokenizer, num_samples=FIT_ROWS, seq_len=FIT_LEN, num_windows=self.fit_windows,
            seed=self.seed,
        )  # fmt: skip

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.dense)

    @property
    def shape(self) -> ModelShape:
        return self.decoder.shape

    @cached_property
    def influence(self) -> Influence:
        return measure_influence(self.decoder, self.text.tokens)


@dataclass(frozen=True)
class Order:
    """What a recipe removes, in its order."""

    removals: list[Block]
    channels: ChannelOrder | None = None
    work_flops: int = 0
    """What the search took; 0 if it was not counted."""

    def number(self, is_enough: Callable[[Mask], bool]) -> int | None:
        """Return how many removals are enough; None if all of them are not."""
        numbers = range(1, len(self.removals) + 1)
        return next((number for number in numbers if is_enough(Mask.of(self.removals[:number]))), None)

    def prune(self, model: PreTrainedModel, number: int | None = None) -> PreTrainedModel:
        """number: of removals; None: all."""
        return bp.prune(model, self.removals[:number], channels=self.channels)


def _searched(draw: Draw, ratio: float | None = None, **options: Any) -> Order:
    found = bp.search(draw.searched, draw.text, ratio=ratio or draw.most, threads_per_replica=draw.threads, **options)
    return Order(found.order, found.channels, found.summary["totals"]["work_flops"])


def _per_ms(draw: Draw, **options: Any) -> Order:
    if draw.times is None:
        raise typer.BadParameter("expected --times with recipes per millisecond.")
    return _searched(draw, strategy="lazy", per="ms", time_for="both", times=str(draw.times), **options)


def _ranked(draw: Draw, values: dict[Block, float]) -> Order:
    space = SearchSpace(shape=draw.shape, blocks=Granularity.LAYER, budget=Budget(ratio=draw.most))
    return Order(sorted(space.all_blocks, key=lambda block: values[block]))


ORDERS: dict[str, Callable[[Draw], Order]] = {
    "blocks": lambda draw: _searched(draw, strategy="lazy"),
    "params": lambda draw: _searched(draw, strategy="lazy", per="params"),
    "layers": lambda draw: _searched(draw, strategy="lazy", blocks="layer"),
    "channels": lambda draw: _searched(draw, strategy="lazy", units="channels"),
    "channels-per-ms": lambda draw: _per_ms(draw, units="channels"),
    "units": lambda draw: _searched(draw, strategy="lazy", units="all"),
    "one-shot": lambda draw: _searched(draw, strategy="one-shot"),
    "shortgpt": lambda draw: _ranked(draw, draw.influence.block_influence),
    "rm": lambda draw: _ranked(draw, draw.influence.relative_magnitude),
}
"""Recipes with one removal order for all shares."""


def _found_for(draw: Draw, ratio: float, **options: Any) -> PreTrainedModel:
    return _searched(draw, ratio, **options).prune(draw.dense)


def _prune_and_comp(draw: Draw, ratio: float) -> PreTrainedModel:
    number = num_layers_for_ratio(draw.shape, ratio, draw.shape.num_layers - 1)
    return prune_and_comp(draw.decoder, draw.fit_text.tokens, num_remove=number).model


def _replaceme(draw: Draw, ratio: float) -> PreTrainedModel:
    number = num_layers_for_ratio(draw.shape, ratio, draw.shape.num_layers - 1)
    return replaceme(draw.decoder, draw.fit_text.tokens, num_remove=number).model


def _slicegpt(draw: Draw, ratio: float) -> PreTrainedModel:
    return slicegpt(draw.dense, draw.fit_text.tokens, sparsity=sparsity_for_ratio(draw.dense, ratio)).model


REBUILT: dict[str, Callable[[Draw, float], PreTrainedModel]] = {
    "evolution": lambda draw, ratio: _found_for(draw, ratio, strategy="evolution", seed=draw.seed),
    "evolution-channels": lambda draw, ratio: _found_for(
        draw, ratio, strategy="evolution", units="channels", seed=draw.seed
    ),
    "multipruner": lambda draw, ratio: _found_for(draw, ratio, strategy="multipruner", units="all"),
    "prune-and-comp": _prune_and_comp,
    "replaceme": _replaceme,
    "slicegpt": _slicegpt,
}
"""Recipes that begin anew for every share."""
REFITTED_BY_THEMSELVES = ("prune-and-comp", "replaceme", "slicegpt")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the rows of all draws.")],
    calibration: Annotated[list[str] | None, typer.Option(help="As for compensate.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="As --perplexity of evaluate.")] = None,
    recipe: Annotated[str, typer.Option(help=f"{', '.join((*ORDERS, *REBUILT))}")] = "blocks,params,layers,shortgpt",
    pruned_only: Annotated[str, typer.Option(help="Recipes whose models are not refitted.")] = "one-shot,rm",
    ratio: Annotated[str, typer.Option(help="Shares of the parameters to remove at least.")] = "",
    speed: Annotated[str, typer.Option(help="Factors by which generating is to be faster.")] = "",
    most: Annotated[float, typer.Option(help="Share up to which blocks are removed for a speed.")] = 0.4,
    model: str = "smollm2",
    search_windows: int = 12,
    fit_windows: int = 36,
    held_out_windows: int = 24,
    seed: int = 42,
    threads: int = 1,
    dtype: str = "float32",
    search_dtype: Annotated[str, typer.Option(help="To search and to generate in. Default: as --dtype.")] = "",
    times: Annotated[Path | None, typer.Option(help="What `blockpruner times` wrote.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for the models of removal orders, refitted.")] = None,
    against: Annotated[str, typer.Option(help="Recipe from which differences are taken. Default: the first one.")] = "",
    report_only: bool = False,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not report_only:
        torch.set_num_threads(threads)
        ratios, speeds = ([float(part) for part in given.split(",") if part] for given in (ratio, speed))
        if speeds and times is None:
            raise typer.BadParameter("expected --times with --speed.")
        if not ratios and not speeds:
            raise typer.BadParameter("expected --ratio or --speed.")
        dense, tokenizer = bp.load(model, dtype=dtype)
        searched = dense if search_dtype in ("", dtype) else bp.load(model, dtype=search_dtype)[0]
        largest = max([*ratios, *([most] if speeds else [])])
        draw = Draw(
            dense, searched, tokenizer, calibration or [], seed, search_windows, fit_windows, largest, threads, times
        )
        tests = texts_to_judge_by(held_out or [], tokenizer, held_out_windows)
        rows = _Rows(out / f"{seed}.json", draw, tests, pruned_only.split(","), save)
        rows.fill(recipe.split(","), ratios, speeds, times)
    report(out, against)


def texts_to_judge_by(
    held_out: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_windows: int
) -> dict[str, Windows]:
    return {
        Path(source).stem: bp.test_text(source, tokenizer, seq_len=FIT_LEN, num_windows=num_windows)
        for source in held_out
    }


def nlls(model: PreTrainedModel, tests: Mapping[str, Windows]) -> dict[str, list[float]]:
    """Return the mean token NLL of each window of each text."""
    return {text: [mean_nll(model, window) for window in windows.tokens] for text, windows in tests.items()}


class _Rows:
    """The models of one draw: what was measured of each, kept in a file."""

    def __init__(
        self, file: Path, draw: Draw, tests: dict[str, Windows], pruned_only: Sequence[str], save: Path | None
    ) -> None:
        self.file, self.draw, self.tests, self.pruned_only, self.save = file, draw, tests, pruned_only, save
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"orders": {}, "rows": []}
        if not any(row["recipe"] == "dense" for row in self.known["rows"]):
            self._add(recipe="dense", at="", ratio=0.0, nll=nlls(draw.dense, tests))

    def fill(
        self, recipes: Sequence[str], ratios: Sequence[float], speeds: Sequence[float], times: Path | None
    ) -> None:
        for name in recipes:
            for share in ratios:
                if not self._has(name, f"{share:.0%}"):
                    self._judge(name, f"{share:.0%}", self._at_ratio(name, share))
            for factor in speeds if name in ORDERS else ():
                if times is not None and not self._has(name, f"{factor}x"):
                    self._at_speed(name, factor, times)

    def _has(self, recipe: str, at: str) -> bool:
        return any((row["recipe"], row["at"]) == (recipe, at) for row in self.known["rows"])

    def _order(self, name: str) -> Order:
        """Return the removal order of a recipe. It is kept, until a longer one is needed."""
        kept = [Block.parse(one) for one in self.known["orders"].get(name, {"blocks": ()})["blocks"]]
        channels = self.file.parent / f"{self.file.stem}-{name}.npz"
        if kept and self.draw.shape.ratio(Mask.of(kept)) >= self.draw.most:
            return Order(kept, ChannelOrder.read(channels) if channels.exists() else None)
        start = time.monotonic()
        order = ORDERS[name](self.draw)
        if order.channels is not None:
            order.channels.write(channels)
        seconds = time.monotonic() - start
        blocks = [str(one) for one in order.removals]
        self.known["orders"][name] = {"blocks": blocks, "seconds": seconds, "work_flops": order.work_flops}
        write_json(self.file, self.known)
        return order

    def _at_ratio(self, name: str, share: float) -> PreTrainedModel:
        if name in REBUILT:
            return REBUILT[name](self.draw, share)
        order = self._order(name)
        return order.prune(self.draw.dense, order.number(lambda mask: self.draw.shape.ratio(mask) >= share))

    def _at_speed(self, name: str, factor: float, times: Path) -> None:
        """Judge the first model of the order that is expected to be as fast as asked. What it reaches is measured."""
        draw, order = self.draw, self._order(name)
        expected = times_of(read_times(times)["both"], draw.shape, times)
        number = order.number(lambda mask: expected.dense / expected.without(mask) >= factor)
        if number is None:
            print(f"{self.file.stem} {name}: {factor}x is not reached without {draw.most:.0%} of the parameters")
            return
        models = [draw.searched, order.prune(draw.searched, number)]
        dense, pruned = generated_tokens_per_s(models, Workload(), repeats=REPEATS)
        self._judge(name, f"{factor}x", order.prune(draw.dense, number), speed=pruned / dense)

    def _judge(self, name: str, at: str, small: PreTrainedModel, **more: float) -> None:
        draw = self.draw
        ratio = 1 - small.num_parameters() / draw.dense.num_parameters()
        row: dict[str, Any] = {"recipe": name, "at": at, "ratio": ratio, **more, "nll": nlls(small, self.tests)}
        if name not in (*self.pruned_only, *REFITTED_BY_THEMSELVES):
            start = time.monotonic()
            small = bp.compensate(small, draw.dense, draw.fit_text, **FIT)
            row |= {"fit_s": time.monotonic() - start, "refitted": nlls(small, self.tests)}
        if self.save is not None and name in ORDERS:
            bp.save(small, draw.tokenizer, self.save / f"{self.file.stem}-{name}-{at}")
        self._add(**row)

    def _add(self, **row: Any) -> None:
        self.known["rows"].append(row)
        write_json(self.file, self.known)
        shown = {key: {text: round(math.exp(mean(values)), 2) for text, values in row[key].items()}
                 for key in ("nll", "refitted") if key in row}  # fmt: skip
        print(f"{self.file.stem} {row['recipe']} {row['at']} {row['ratio']:.1%} {shown}", flush=True)


if __name__ == "__main__":
    run_benchmark(main)
