"""Reads run directories for the other commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from blockpruner.engine.blocks import Block
from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.source import is_same_model
from blockpruner.searching.content import RunSummary, StepSummary
from blockpruner.searching.records import Record, ResultRecord, RoundRecord, StepRecord
from blockpruner.searching.run import read_records
from blockpruner.searching.steps import block_of, steps_of


@dataclass(frozen=True)
class Removals:
    """The removals of a search, to be applied to the same model."""

    summary: RunSummary
    steps: list[StepSummary]

    @property
    def order(self) -> list[Block]:
        return [block_of(step) for step in self.steps]

    def warn_if_unscored(self, num_remove: int, say: Callable[[str], None]) -> None:
        """Print a note if the search never scored the first `num_remove` removals alone.

        Some searches choose all removals together.
        """
        keys = ("nll", *(metric.key for metric in Metric.all().values()))
        if num_remove and all(self.steps[num_remove - 1].get(key) is None for key in keys):
            say(
                f"note: the search chose all {len(self.steps)} blocks together; the first {num_remove} alone were "
                f"never scored"
            )


def read_removals(path: Path, model: str, revision: str | None) -> tuple[Removals, str | None]:
    """Return the removals of a run and the revision of its model. Raises UserError if it searched another model."""
    removals = Removals(read_summary(path), recorded_steps(path))
    searched = removals.summary["model"]
    if not is_same_model(searched, model):
        raise UserError(f"expected the model that {str(path)!r} searched, {searched!r}, got {model!r}.")
    recorded = removals.summary["config"]["revision"]
    if revision not in (None, recorded):
        raise UserError(f"expected the revision that {str(path)!r} searched, {recorded!r}, got {revision!r}.")
    return removals, recorded


def recorded_steps(path: Path) -> list[StepSummary]:
    """Return the steps of a run from its ledger, which can be one step ahead of run.json after a crash."""
    ledger = path / "ledger.jsonl"
    if not ledger.exists():
        return read_summary(path)["steps"]
    records, _ = read_records(ledger)

    def of(kind: type[Record]) -> list[Any]:
        return [record for record in records if isinstance(record, kind)]

    return steps_of(of(StepRecord), of(RoundRecord), of(ResultRecord))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run. Incomplete lines are skipped."""
    events = []
    file = path / "events.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Return the rows of scores.parquet of a run, or no rows if the file is missing."""
    file = path / "scores.parquet"
    if not file.exists():
        return []
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        return rows
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{str(file)!r} is damaged ({first_line(error)}); run the search command again to rewrite it."
        ) from error


def read_summary(path: Path) -> RunSummary:
    """Return the content of run.json. Raises UserError if it cannot be read."""
    try:
        summary: RunSummary = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return summary
    except OSError as error:
        raise UserError(f"expected a run directory with a run.json, got {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{str(path / 'run.json')!r} is damaged ({error}).") from error
