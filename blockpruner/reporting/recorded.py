"""A run directory as its report sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.reporting.influence import read_influence
from blockpruner.searching.config import FREE_ON_RESUME, SearchConfig
from blockpruner.searching.run import read_events, read_scores, read_summary

METRICS = {Metric.PPL: "perplexity", Metric.KL: "KL divergence", Metric.JS: "JS divergence"}

MAX_LABEL = 40
"""Characters of a legend's line."""


@dataclass(frozen=True)
class Point:
    """What was found of a candidate."""

    value: float
    """Perplexity or divergence; NaN where it was not finite."""
    exact: bool
    """Scored on all windows; else estimated from some."""


@dataclass(frozen=True)
class Recorded:
    path: Path
    name: str
    """Of its directory; the path as given where other runs of the report have a directory of that name."""
    label: str
    """What it is called beside the other runs of the report."""
    differences: str
    """The options in which it differs from them."""
    summary: dict[str, Any]
    config: SearchConfig
    scores: list[dict[str, Any]]
    """Rows of scores.parquet."""
    events: list[dict[str, Any]]
    influence: dict[Block, float | None]
    """Block influence, if it was measured."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = self.summary["steps"]
        return steps

    @property
    def blocks(self) -> list[Block]:
        """The blocks (or layers) that were removed, in their order."""
        return [Block.from_json(step["block"]) for step in self.steps]

    @property
    def num_layers(self) -> int:
        number: int = self.summary["num_layers"]
        return number

    @property
    def metric_name(self) -> str:
        return METRICS[self.config.metric]

    @property
    def dense(self) -> float:
        """Perplexity of the dense model; a divergence from itself is zero."""
        return _number(self.summary["dense"]["perplexity"]) if self.config.metric is Metric.PPL else 0.0

    @property
    def values(self) -> list[float]:
        """Perplexity or divergence after each step; NaN where it is not known."""
        return [self.value(step) for step in self.steps]

    @property
    def is_path(self) -> bool:
        """Whether the search went one block at a time; else only some of the steps were scored."""
        return all(math.isfinite(value) for value in self.values)

    def value(self, line: dict[str, Any]) -> float:
        """Perplexity or divergence in a step or a score."""
        return _number(line.get("perplexity" if self.config.metric is Metric.PPL else str(self.config.metric)))

    def first_step(self) -> dict[Block, Point]:
        """Of every block (or layer) that was scored when it alone was absent."""
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
        """The second and the third best of the candidates that were scored in full in this step.

        Empty where the step was not chosen among candidates for the lowest loss: beams and generations judge whole
        masks, and `--per params` looks at the increase per parameter.
        """
        rows = [row for row in self.scores if row["step"] == step and row["block"] and row["exact"]]
        ranked = sorted((row for row in rows if math.isfinite(self.value(row))), key=self.value)
        chosen = self.steps[step - 1]
        if self.config.per != "block" or str(Block.from_json(chosen["block"])) not in {
            row["block"] for row in ranked[:1]
        }:
            return []
        return [(Block.parse(row["block"]), self.value(row)) for row in ranked[1:3]]


def read_recorded(paths: Sequence[Path]) -> list[Recorded]:
    """Runs of one model, told apart by what differs in their configs. Raises UserError if they cannot be."""
    summaries = [read_summary(path) for path in paths]
    for path, summary in zip(paths, summaries, strict=True):
        if not summary["steps"]:
            raise UserError(f"expected a run with at least one step, got {str(path)!r}, which has none yet.")
        if (summary["model"], summary["num_layers"]) != (summaries[0]["model"], summaries[0]["num_layers"]):
            raise UserError(
                f"expected runs of one model, got {summaries[0]['model']!r} in {str(paths[0])!r} and "
                f"{summary['model']!r} in {str(path)!r}; report them one by one."
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
    """The options in which configs differ, as far as they bear on the result."""
    options = [config.to_json() for config in configs]
    names = [field.name for field in fields(SearchConfig) if field.name not in FREE_ON_RESUME]
    different = [name for name in names if any(option[name] != options[0][name] for option in options)]
    return [", ".join(_option(name, option[name]) for name in different) for option in options]


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _labels(names: Sequence[str], differences: Sequence[str]) -> list[str]:
    """What differs, where that is short and tells runs apart; else the directories."""
    if all(0 < len(text) <= MAX_LABEL and differences.count(text) == 1 for text in differences):
        return list(differences)
    return list(names)


def _option(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, list):
        return f"{words} {','.join(value) or 'nothing'}"
    if name == "calibration":
        value = Path(value).name
    return f"default {words}" if value is None else f"{words} {value}"


def _number(value: float | None) -> float:
    """What is not finite was recorded as null."""
    return math.nan if value is None else value
