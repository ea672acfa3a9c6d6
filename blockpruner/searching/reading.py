"""Reads run directories for the other commands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pyarrow
import pyarrow.parquet
from typing_extensions import TypedDict

from blockpruner.engine.blocks import Block, are_removals, removals_told
from blockpruner.engine.channels import CHANNELS_FILE, ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import check_shape, is_there, misfit, parse_json, read_bytes, read_json
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.identity import Identity, identity
from blockpruner.engine.sections import ModelSource
from blockpruner.searching.config import BUDGET, FREE_ON_RESUME, SearchConfig
from blockpruner.searching.content import RunSummary, StepSummary
from blockpruner.searching.history import History, read_history
from blockpruner.searching.records import MaskText, ScoreRecord
from blockpruner.searching.run import score_columns
from blockpruner.searching.steps import block_of
from blockpruner.searching.summary import summary_of


class _Event(TypedDict):
    type: str


class _UnitEvent(_Event):
    step: int
    replica: str
    start_s: float
    stop_s: float


class _ScoreRow(TypedDict):
    step: int
    block: str | None
    mask: MaskText
    exact: bool


@dataclass(frozen=True)
class Removals:
    """The removals of a search, to be applied to the same model."""

    summary: RunSummary
    channels: ChannelOrder | None = None
    """The order of the channels, if groups of them were removed."""

    @classmethod
    def read(cls, path: Path) -> Self:
        summary = read_summary(path)
        return cls(summary, read_order(path, summary))

    @property
    def steps(self) -> list[StepSummary]:
        return self.summary["steps"]

    def check_model(self, found: Identity, run: str, say: Callable[[str], None]) -> None:
        """Raise UserError if the search had another model. run: what the search is called."""
        began = model_of(self.summary)
        if not began.is_same(found):
            raise UserError(
                f"expected the model that {run!r} searched, {began}, got {found}; give {began.how_to_give}."
            )
        if began.fingerprint == found.fingerprint and began.name != found.name:
            say(f"note: {found.name!r} has the weights that the run searched as {began.name!r}")

    @property
    def order(self) -> list[Block]:
        return [block_of(step) for step in self.steps]

    @property
    def are_refitted(self) -> bool:
        """Whether the search scored models whose remaining blocks had been refitted."""
        return bool(self.summary["config"].get("compensate"))

    def expected_ms(self, num_remove: int) -> dict[str, Any] | None:
        """Return what the model without the first `num_remove` removals is expected to take, in milliseconds, beside
        the dense one; None unless the search had the times of blocks."""
        times, after = self.summary.get("times"), self.steps[num_remove - 1].get("ms")
        if times is None or after is None:
            return None
        of = SearchConfig.from_json(self.summary["config"]).time_for
        setting = self.summary.get("times_setting")
        return {"for": of.value, "dense": times["dense"], "pruned": after, **({"setting": setting} if setting else {})}

    def provenance(self, num_remove: int) -> dict[str, Any]:
        """What a checkpoint without the first `num_remove` removals records of the search."""
        config, found = self.summary["config"], dict[str, Any]()
        if (expected := self.expected_ms(num_remove)) is not None:
            found["expected_ms"] = expected
        found["calibration"] = {
            **self.summary["calibration"],
            **{key: config[key] for key in ("calibration", "num_samples", "seq_len", "seed")},
        }
        if not self.are_refitted:
            found["dense"] = self.summary["dense"]
            found["pruned"] = {key: self.steps[num_remove - 1][key] for key in ("nll", "perplexity")}
        return found

    def warn_if_unscored(self, num_remove: int, say: Callable[[str], None]) -> None:
        """Print a note if the search never scored the model without the first `num_remove` removals as it is.

        Some searches choose all removals together, or refit the blocks that remain.
        """
        if num_remove and self.are_refitted:
            say(
                "note: the search refitted the blocks that remain, and its perplexities are of those; use `compensate` "
                "to refit them in the result, too"
            )
        keys = ("nll", *(metric.key for metric in Metric.all().values()))
        if num_remove and all(self.steps[num_remove - 1].get(key) is None for key in keys):
            say(
                f"note: the search chose all {removals_told(self.order)} together; the first {num_remove} alone were "
                f"never scored"
            )


def read_removals(path: Path, source: ModelSource, say: Callable[[str], None]) -> tuple[Removals, str | None]:
    """Return the removals of a run and the revision of its model.

    Raises UserError if it searched another model than `source`.
    """
    removals = Removals.read(path)
    recorded: str | None = removals.summary["config"].get("revision")
    began = model_of(removals.summary)
    if source.revision not in (None, recorded, began.fingerprint):
        raise UserError(f"expected the revision that {str(path)!r} searched, {recorded!r}, got {source.revision!r}.")
    revision = source.revision or recorded
    removals.check_model(identity(replace(source, revision=revision)), str(path), say)
    return removals, revision


def read_order(path: Path, summary: RunSummary) -> ChannelOrder | None:
    """Return the order of the channels of a run, or None if it removed whole blocks. Raises UserError if its file is
    missing or damaged."""
    if (recorded := summary.get("channels")) is None:
        return None
    order = ChannelOrder.read(path / CHANNELS_FILE)
    if order.digest != recorded["digest"]:
        raise UserError(
            f"{str(path / CHANNELS_FILE)!r} is damaged (it is not the order that the run recorded); run the same "
            f"search again to restore it."
        )
    return order


def model_of(summary: RunSummary) -> Identity:
    """Return the model that a run searched."""
    return Identity(summary["model"], summary.get("fingerprint"))


def read_summary(path: Path) -> RunSummary:
    """Return the content of run.json, with all that the ledger knows taken from the ledger: it is the truth, and it can
    be one step ahead of run.json after a crash.

    Raises UserError if the run cannot be read.
    """
    file, ledger = path / "run.json", path / "ledger.jsonl"
    if not is_there(file):
        raise UserError(f"expected a run directory with a run.json, got {str(path)!r} without one.")
    summary: RunSummary = read_json(file, RunSummary, "run the same search again to rewrite it")
    history = read_history(ledger) if is_there(ledger) else History()
    if history.header is not None:
        free = {name: value for name, value in summary["config"].items() if name in FREE_ON_RESUME | BUDGET}
        shape = {"num_parameters": summary["num_parameters"], "num_layers": summary["num_layers"]}
        summary = summary_of(history, status=summary["status"], free=free, shape=shape)
    if wrong := _misfit_of_steps(summary):
        raise UserError(f"{str(file)!r} is damaged ({wrong}); run the same search again to rewrite it.")
    return summary


def _misfit_of_steps(summary: RunSummary) -> str:
    """Describe what steps say that no search can have done, or return an empty string."""
    steps, num_layers = summary["steps"], summary["num_layers"]
    if [step["step"] for step in steps] != list(range(1, len(steps) + 1)):
        return "its steps are not numbered 1, 2, …"
    blocks = [block_of(step) for step in steps]
    if wrong := next((block for block in blocks if block.layer >= num_layers), None):
        return f"{wrong} of a model with {num_layers} layers"
    if not are_removals(blocks):
        return "a block is removed twice"
    keys = [metric.key for metric in Metric.all().values()]
    return misfit([[step.get(key) for key in keys] for step in steps], list[list[float | None]])


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run. Lines that are incomplete or damaged are skipped: no result depends on them."""
    file = path / "events.jsonl"
    events = []
    for line in read_bytes(file).split(b"\n") if file.is_file() else []:
        with suppress(ValueError):
            event = parse_json(line)
            if not misfit(event, _Event) and (event["type"] != "unit" or not misfit(event, _UnitEvent)):
                events.append(event)
    return events


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Return the rows of scores.parquet of a run, or no rows if the file is missing.

    Raises UserError if they are not those of the ledger.
    """
    file, ledger = path / "scores.parquet", path / "ledger.jsonl"
    if not is_there(file):
        return []
    again = "run the search command again to rewrite it"
    read_bytes(file)  # reports what is no file
    try:
        table = pyarrow.parquet.read_table(file)
        columns = [field for field in score_columns() if field.name in table.column_names]
        rows: list[dict[str, Any]] = (
            table.select([field.name for field in columns]).cast(pyarrow.schema(columns)).to_pylist()
        )
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{str(file)!r} is damaged (it is not the table that a search writes); {again}.") from error
    check_shape(rows, list[_ScoreRow], repr(str(file)), again)
    if is_there(ledger):
        scores = [score.values() for score in read_history(ledger).all(ScoreRecord)]
        known = [{name: score.get(name) for name in row} for row, score in zip(rows, scores, strict=False)]
        if rows != known:
            raise UserError(f"{str(file)!r} is damaged (it does not agree with {ledger.name}); {again}.")
    return rows
