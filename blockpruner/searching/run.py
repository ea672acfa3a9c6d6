"""The run directory: the ledger is the truth, everything else is derived from it.

ledger.jsonl holds one JSON object a line, flushed and synced: `run` (config, kernel shape, calibration; the first),
`unit` (loss sums of some masks over some windows, as they come in), `score` (a mask's result), `step` (a removal),
`round` (masks were judged as wholes), `result` (the removals of the mask that was found, where the steps did not lead
to it), `audit` (a step done again exhaustively) and `kernel` (another kernel shape from here on: a device ran out of
memory).

Units and scores belong to a phase: 0 for the dense model, then one for each step or round, as they come; the audit of
step s is phase -s.

events.jsonl is for looking at: when each unit ran where, and what happened to replicas.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
import pyarrow.parquet

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.loading import is_same_model
from blockpruner.engine.score import perplexity
from blockpruner.engine.scoring.scoring import UnitResult
from blockpruner.engine.work.units import WorkUnit
from blockpruner.files import append_line, lock_folder, plain, replacing, write_json

SPENT = ("work_flops", "naive_work_flops", "wall_s")
SCORE_COLUMNS = pyarrow.schema(
    [
        ("step", pyarrow.int32()),
        ("block", pyarrow.string()),
        ("mask", pyarrow.string()),
        ("nll", pyarrow.float64()),
        ("perplexity", pyarrow.float64()),
        ("kl", pyarrow.float64()),
        ("js", pyarrow.float64()),
        ("num_windows", pyarrow.int32()),
        ("exact", pyarrow.bool_()),
        ("seconds", pyarrow.float64()),
        ("replica", pyarrow.string()),
    ]
)


class RunDirectory:
    """One process at a time owns a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ledger_path = path / "ledger.jsonl"
        self._events_path = path / "events.jsonl"
        self._lock = lock_folder(path)
        try:
            self.lines: list[dict[str, Any]] = []
            self.phases: list[dict[str, Any]] = []
            """Steps and rounds that are done, as they were recorded."""
            self._of_type: dict[str, list[dict[str, Any]]] = {}
            self._units: dict[int, list[dict[str, Any]]] = {}
            self._spent: dict[int, tuple[int, float]] = {}
            for line in self._read():
                self._take_in(line)
            self._stream = self._ledger_path.open("a", encoding="utf-8")
            self._events = self._events_path.open("a", encoding="utf-8")
        except OSError as error:
            self._lock.release()
            raise UserError(f"cannot write {error.filename!r}: {error.strerror}; choose another --out.") from error
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what a full disk did not take was reported when it was written
            self._stream.close()
        with suppress(OSError):
            self._events.close()
        is_empty = not self.lines
        if is_empty:  # nothing was found out: leave the place as it was
            self._ledger_path.unlink(missing_ok=True)
            self._events_path.unlink(missing_ok=True)
        self._lock.release()
        if is_empty:
            (self.path / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # it may hold files that are not ours
                self.path.rmdir()

    @property
    def header(self) -> dict[str, Any] | None:
        """The first line, if the run has begun."""
        return self.lines[0] if self.lines else None

    @property
    def kernel(self) -> dict[str, Any]:
        """The kernel shape in force."""
        assert self.header is not None
        changed = self.of_type("kernel")
        kernel: dict[str, Any] = changed[-1] if changed else self.header["kernel"]
        return kernel

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [_without_type(line) for line in self._of_type.get(kind, [])]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The removals that the run has come to."""
        return _steps(self.lines)

    def append(self, kind: str, values: dict[str, Any]) -> None:
        line = {"type": kind, **plain(values)}
        append_line(self._stream, line)
        self._take_in(line)

    def append_event(self, kind: str, values: dict[str, Any]) -> None:
        """Not synced: a lost event loses nothing of the run."""
        with suppress(OSError):
            self._events.write(json.dumps({"type": kind, **plain(values)}, allow_nan=False) + "\n")
            self._events.flush()

    def append_unit(self, step: int, result: UnitResult[WorkUnit], wall_s: float) -> None:
        """wall_s: time since the step's unit before this one, or since the step began in this session."""
        unit = result.unit
        self.append_event(
            "unit",
            {
                "step": step,
                "replica": result.replica,
                "start_s": result.start_s,
                "stop_s": result.stop_s,
                "seconds": result.seconds,
                "num_masks": len(unit.masks),
                "first": unit.first,
                "stop": unit.stop,
                "flops": unit.flops,
            },
        )
        self.append(
            "unit",
            {
                "step": step,
                "masks": [str(mask) for mask in unit.masks],
                "first": unit.first,
                "stop": unit.stop,
                "sums": result.value,
                "seconds": result.seconds,
                "wall_s": wall_s,
                "flops": unit.flops,
                "replica": result.replica,
            },
        )

    def unit_results(self, phase: int) -> StepSums:
        """The sums that the ledger holds for a phase. Where the kernel shape changed before the phase was done, only
        those of the new one."""
        sums = StepSums()
        for line in self._units.get(phase, []):
            masks = [Mask.parse(mask) for mask in line["masks"]]
            values = [[math.nan if value is None else value for value in row] for row in line["sums"]]
            sums.add(masks, line["first"], line["stop"], values, line["seconds"], line["replica"])
        return sums

    def spent(self, phase: int) -> tuple[int, float]:
        """Matmul FLOPs and wall seconds of a phase's units in all sessions."""
        return self._spent.get(phase, (0, 0.0))

    def _take_in(self, line: dict[str, Any]) -> None:
        """Index a line, so that no question has to look through the ledger."""
        self.lines.append(line)
        self._of_type.setdefault(line["type"], []).append(line)
        if line["type"] in ("step", "round"):
            self.phases.append(line)
        if line["type"] == "unit":
            phase = line["step"]
            self._units.setdefault(phase, []).append(line)
            flops, wall_s = self.spent(phase)
            self._spent[phase] = flops + line["flops"], wall_s + line["wall_s"]
        if line["type"] == "kernel":
            done = {*range(1, len(self.phases) + 1), *(-audit["step"] for audit in self._of_type.get("audit", []))}
            self._units = {phase: lines for phase, lines in self._units.items() if phase in done}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace run.json and the files that are derived from the ledger."""
        write_json(self.path / "run.json", summary)
        steps = [Block.from_json(step["block"]) for step in self.steps]
        write_json(self.path / "sequence.json", official_sequence(steps))
        scores = self.of_type("score")
        table = pyarrow.Table.from_pylist(scores, schema=SCORE_COLUMNS)
        with replacing(self.path / "scores.parquet") as aside:
            pyarrow.parquet.write_table(table, aside)

    def _read(self) -> list[dict[str, Any]]:
        """All lines; a torn last line is cut off."""
        if not self._ledger_path.exists():
            return []
        lines, num_bytes = parse_ledger(self._ledger_path)
        os.truncate(self._ledger_path, num_bytes)
        return lines


class StepSums:
    """NLL sums of one step, as they come in: by mask, by window."""

    def __init__(self) -> None:
        self.sums: dict[Mask, dict[int, float]] = {}
        self.seconds: dict[Mask, float] = {}
        self.replicas: dict[Mask, set[str]] = {}

    def add(
        self, masks: Iterable[Mask], first: int, stop: int, sums: list[list[float]], seconds: float, replica: str
    ) -> None:
        masks = list(masks)
        for mask, row in zip(masks, sums, strict=True):
            known = self.sums.setdefault(mask, {})
            if not known.keys() >= set(range(first, stop)):  # else it was done twice, for another chunking
                self.seconds[mask] = self.seconds.get(mask, 0.0) + seconds / len(masks)
            known.update(zip(range(first, stop), row, strict=True))
            self.replicas.setdefault(mask, set()).add(replica)

    def has(self, masks: Iterable[Mask], first: int, stop: int) -> bool:
        return all(window in self.sums.get(mask, {}) for mask in masks for window in range(first, stop))


def losses(value: float, metric: Metric) -> dict[str, float | None]:
    """How a mean token loss is recorded: perplexity exists only for the NLL, and a divergence has a name of its own."""
    if metric is Metric.PPL:
        return {"nll": value, "perplexity": perplexity(value)}
    return {"nll": None, "perplexity": None, metric.value: value}


def _steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `step` lines, or what a `result` line made of them. The work of rounds counts for the last step."""
    steps = [_without_type(line) for line in lines if line["type"] == "step"]
    results = [line for line in lines if line["type"] == "result"]
    if not results:
        return steps
    rounds = [line for line in lines if line["type"] == "round"]
    found: list[dict[str, Any]] = []
    for number, values in enumerate(results[-1]["steps"], start=1):
        same = steps[number - 1] if number <= len(steps) else None
        spent = {key: same[key] if same else 0 for key in (*SPENT, "num_candidates", "num_scored")}
        found.append({"step": number, **values, **spent})
    for key in SPENT:
        found[-1][key] += sum(line[key] for line in rounds) + sum(step[key] for step in steps[len(found) :])
    return found


def official_sequence(removed: list[Block]) -> dict[str, list[list[str | int]]]:
    """The official program's `*_del_order_list.json`: step to all blocks removed so far, sorted by layer."""
    sequence: dict[str, list[list[str | int]]] = {}
    for step in range(1, len(removed) + 1):
        parts = [part for block in removed[:step] for part in block.parts]
        sequence[str(step)] = [part.to_json() for part in sorted(parts, key=lambda part: part.depth)]
    return sequence


def read_official_sequence(path: Path) -> list[Block]:
    """Removal order from a `*_del_order_list.json`: the differences of successive steps."""
    try:
        steps = dict(json.loads(path.read_text(encoding="utf-8")))
        sets = [
            {Block(Kind(kind), int(layer)) for kind, layer in steps[str(step)]} for step in range(1, len(steps) + 1)
        ]
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'expected {str(path)!r} in the official format {{"1": [["mha", 25]], "2": ...}}; it is not ({error}).'
        ) from error
    if not sets:
        raise UserError(f"expected at least one step in {str(path)!r}, which has none.")
    if negative := [block for blocks in sets for block in blocks if block.layer < 0]:
        raise UserError(f"expected layers from 0 in {str(path)!r}, got {negative[0].layer}.")
    order: list[Block] = []
    for step, blocks in enumerate(sets, start=1):
        new = sorted(blocks - set(order), key=lambda block: block.depth)
        if not new or set(order) - blocks:
            raise UserError(f"expected step {step} of {str(path)!r} to add to the step before it; it does not.")
        order += new
    return order


def recorded_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a run: from its ledger, which may be a step ahead of run.json after a crash."""
    ledger = path / "ledger.jsonl"
    if not ledger.exists():
        steps: list[dict[str, Any]] = read_summary(path)["steps"]
        return steps
    lines, _ = parse_ledger(ledger)
    return _steps(lines)


@dataclass(frozen=True)
class Removals:
    """What a search removed, for those who take blocks out of the same model."""

    summary: dict[str, Any]
    steps: list[dict[str, Any]]

    @property
    def order(self) -> list[Block]:
        return [Block.from_json(step["block"]) for step in self.steps]

    def warn_if_unscored(self, num_remove: int, say: Callable[[str], None]) -> None:
        """Some searches look for all removals together, and do not know what the first so many do."""
        if num_remove and all(self.steps[num_remove - 1].get(key) is None for key in ("nll", *Metric)):
            say(
                f"note: the search looked for all {len(self.steps)} blocks together; "
                f"the first {num_remove} were never scored"
            )


def read_removals(path: Path, model: str, revision: str | None) -> tuple[Removals, str | None]:
    """The removals of a run, and the revision of its model. Raises UserError if it searched another model."""
    removals = Removals(read_summary(path), recorded_steps(path))
    searched = removals.summary["model"]
    if not is_same_model(searched, model):
        raise UserError(f"expected the model that {str(path)!r} searched, {searched!r}, got {model!r}.")
    recorded = removals.summary["config"]["revision"]
    if revision not in (None, recorded):
        raise UserError(f"expected the revision that {str(path)!r} searched, {recorded!r}, got {revision!r}.")
    return removals, recorded


def parse_ledger(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All complete lines of a ledger, and the number of bytes that they take: a torn last line does not count."""
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    lines = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise UserError(
                f"{str(path)!r} is damaged in line {number}; delete that line and all after it to resume from there, "
                f"or choose another --out."
            ) from None
    return lines, len(complete)


def read_events(path: Path) -> list[dict[str, Any]]:
    """A run's events; a torn line is left out."""
    events = []
    file = path / "events.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's scores.parquet; none if it was left behind."""
    file = path / "scores.parquet"
    if not file.exists():
        return []
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        return rows
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{str(file)!r} is damaged ({first_line(error)}); the search's command writes it anew."
        ) from error


def read_summary(path: Path) -> dict[str, Any]:
    """A run's run.json, or a UserError."""
    try:
        summary: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return summary
    except OSError as error:
        raise UserError(f"expected a run directory with a run.json, got {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{str(path / 'run.json')!r} is damaged ({error}).") from error


def _without_type(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "type"}
