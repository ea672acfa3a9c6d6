"""The content of a run directory, as the report uses it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.search.budget import Per
from blockpruner.reporting.influence import read_influence
from blockpruner.searching.config import FREE_ON_RESUME, SearchConfig
from blockpruner.searching.content import RunSummary, StepSummary
from blockpruner.searching.reading import model_of, read_events, read_scores, read_summary

MAX_LABEL = 40
"""Maximum number of characters in a legend entry."""


@dataclass(frozen=True)
class Point:
    """The score of a candidate."""

    value: float
    """Perplexity or divergence; NaN if it was not finite."""
    exact: bool
    """Whether it was scored on all windows, and not estimated from some of them."""


@dataclass(frozen=True)
class Recorded:
    path: Path
    name: str
    """Name of the run directory, or its path if several runs of the report have the same directory name."""
    label: str
    """Label that distinguishes the run from the other runs of the report."""
    differences: str
    """The options in which the run differs from the other runs."""
    summary: RunSummary
    config: SearchConfig
    scores: list[dict[str, Any]]
    """Rows of scores.parquet."""
    events: list[dict[str, Any]]
    influence: dict[Block, float | None]
    """Block influence, if it was measured."""

    @property
    def steps(self) -> list[StepSummary]:
        return self.summary["steps"]

    @property
    def blocks(self) -> list[Block]:
        """The removed blocks (or layers), in order of removal."""
        return [Block.from_json(step["block"]) for step in self.steps]

    @property
    def has_groups(self) -> bool:
        """Whether some removals are groups of a block."""
        return any(block.part is not None for block in self.blocks)

    @property
    def num_layers(self) -> int:
        number: int = self.summary["num_layers"]
        return number

    @property
    def mixers(self) -> list[str]:
        """What mixes the tokens of each layer; empty if all have attention."""
        return self.summary.get("mixers", [])

    @property
    def missing(self) -> frozenset[Block]:
        """Blocks that layers with one block do not have."""
        return frozenset(Block.from_json(pair) for pair in self.summary.get("missing", []))

    @property
    def num_blocks(self) -> int:
        """Number of blocks (or layers) of the model, of the kind that the search removes."""
        return sum(block not in self.missing for block in self.config.blocks.candidates(self.num_layers))

    @property
    def metric_name(self) -> str:
        return self.config.metric.label

    @property
    def dense(self) -> float:
        """Perplexity of the dense model, or zero for a divergence."""
        dense = self.summary["dense"]
        return 0.0 if self.config.metric.needs_dense else _number(dense and dense["perplexity"])

    @property
    def values(self) -> list[float]:
        """Perplexity or divergence after each step; NaN if it is not known."""
        return [self.value(step) for step in self.steps]

    @property
    def is_path(self) -> bool:
        """Whether the search removed one block at a time. Otherwise only some of the steps were scored."""
        return all(math.isfinite(value) for value in self.values)

    def value(self, line: Mapping[str, object]) -> float:
        """Return the perplexity or divergence of a step or a score."""
        return _number(self.config.metric.shown(line))

    def first_step(self) -> dict[Block, Point]:
        """Return the score of every block (or layer) that was removed alone."""
        found: dict[Block, Point] = {}
        for row in self.scores:
            absent = Mask.parse(row["mask"]).absent
            if row["step"] != 1 or not absent:
                continue
            block = next(iter(absent))
            if self.config.blocks is Granularity.LAYER:
                block = Block(Kind.LAYER, block.layer)
            if absent == frozenset(block.parts):
                found[block] = Point(self.value(row), row["exact"])
        return found

    def runners_up(self, step: int) -> list[tuple[Block, float]]:
        """Return the second and the third best candidates among those scored in full in this step.

        The list is empty if the step was not chosen by the lowest loss of single candidates: beams and generations
        compare whole masks, and `--per params` compares the increase per parameter.
        """
        rows = [row for row in self.scores if row["step"] == step and row["block"] and row["exact"]]
        ranked = sorted((row for row in rows if math.isfinite(self.value(row))), key=self.value)
        chosen = self.steps[step - 1]
        if self.config.per is not Per.BLOCK or str(Block.from_json(chosen["block"])) not in {
            row["block"] for row in ranked[:1]
        }:
            return []
        return [(Block.parse(row["block"]), self.value(row)) for row in ranked[1:3]]


def read_recorded(paths: Sequence[Path]) -> list[Recorded]:
    """Read runs of one model, labelled by the differences between their configs.

    Raises UserError if a run has no steps or the models differ.
    """
    summaries = [read_summary(path) for path in paths]
    for path, summary in zip(paths, summaries, strict=True):
        if not summary["steps"]:
            raise UserError(f"expected a run with at least one step, got {str(path)!r}, which has none yet.")
        is_same = model_of(summary).is_same(model_of(summaries[0]))
        if not is_same or summary["num_layers"] != summaries[0]["num_layers"]:
            raise UserError(
                f"expected runs of one model, got {model_of(summaries[0])} in {str(paths[0])!r} and "
                f"{model_of(summary)} in {str(path)!r}; report them one by one."
            )
    configs = [SearchConfig.from_json(summary["config"]) for summary in summaries]
    differences = _differences(configs)
    names = _names(paths)
    labels = _labels(names, differences)
    return [
        Recorded(
            path=path,
            name=name,
            label=label,
            differences=different,
            summary=summary,
            config=config,
            scores=read_scores(path),
            events=read_events(path),
            influence=read_influence(path, summary["calibration"]["fingerprint"]),
        )
        for path, name, label, different, summary, config in zip(
            paths, names, labels, differences, summaries, configs, strict=True
        )
    ]


def _differences(configs: Sequence[SearchConfig]) -> list[str]:
    """Describe the differing options of each config, without those that do not affect the result."""
    given = [config.given() for config in configs]
    names = dict.fromkeys(name for config in configs for name in config.flat() if name not in FREE_ON_RESUME)
    different = [name for name in names if any(one.get(name) != given[0].get(name) for one in given)]
    flat = [config.flat() for config in configs]
    return [", ".join(_option(name, one[name]) for name in different if name in one) for one in flat]


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _labels(names: Sequence[str], differences: Sequence[str]) -> list[str]:
    """Return the differences as labels if they are short and unique, else the directory names."""
    if all(0 < len(text) <= MAX_LABEL and differences.count(text) == 1 for text in differences):
        return list(differences)
    return list(names)


def _option(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if name == "calibration":
        value = " and ".join(Path(text).name for text in value)
    if isinstance(value, tuple):
        return f"{words} {','.join(value) or 'nothing'}"
    return f"default {words}" if value is None else f"{words} {value}"


def _number(value: float | None) -> float:
    """Restore NaN. Values that are not finite are recorded as null."""
    return math.nan if value is None else value
