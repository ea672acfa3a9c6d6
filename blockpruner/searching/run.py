"""The run directory. The ledger is the source of truth, and everything else is derived from it.

ledger.jsonl contains one record per line (`records.py`), flushed and synced. events.jsonl is for information only: it
lists when and where each unit ran, and what happened to replicas.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet

from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.scoring.scorer import UnitResult
from blockpruner.engine.work.units import KernelShape, WorkUnit
from blockpruner.files import lock_folder, plain, replacing, write_json
from blockpruner.searching.content import RunSummary, StepSummary
from blockpruner.searching.ledger import append_line, damaged, parse_ledger
from blockpruner.searching.records import (
    AuditRecord,
    KernelRecord,
    PhaseRecord,
    Record,
    ResultRecord,
    RoundRecord,
    RunRecord,
    ScoreRecord,
    StepRecord,
    Sums,
    UnitRecord,
    record_of,
)
from blockpruner.searching.sequence import official_sequence
from blockpruner.searching.steps import block_of, steps_of

RecordT = TypeVar("RecordT", bound=Record)


class RunDirectory:
    """An open run directory. Only one process at a time can own it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ledger_path = path / "ledger.jsonl"
        self._events_path = path / "events.jsonl"
        self._lock = lock_folder(path)
        try:
            self._records: list[Record] = []
            self.phases: list[PhaseRecord] = []
            """Completed steps and rounds."""
            self._units: dict[int, list[UnitRecord]] = {}
            self._spent: dict[int, tuple[int, float]] = {}
            for record in self._read():
                self._take_in(record)
            self._stream = self._ledger_path.open("a", encoding="utf-8")
            self._events = self._events_path.open("a", encoding="utf-8")
        except OSError as error:
            self._lock.release()
            raise UserError(f"cannot write {error.filename!r}: {error.strerror}; choose another `out`.") from error
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk was already reported during the write
            self._stream.close()
        with suppress(OSError):
            self._events.close()
        is_empty = not self._records
        if is_empty:  # there is nothing to keep: restore the folder as it was
            self._ledger_path.unlink(missing_ok=True)
            self._events_path.unlink(missing_ok=True)
        self._lock.release()
        if is_empty:
            (self.path / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # it may contain other files
                self.path.rmdir()

    @property
    def header(self) -> RunRecord | None:
        """The first record, if the run has begun."""
        return next(iter(self.all(RunRecord)), None)

    @property
    def kernel(self) -> KernelShape | None:
        """The current kernel shape, if the run has begun."""
        if changed := self.all(KernelRecord):
            return changed[-1].kernel
        return None if self.header is None else KernelShape(**self.header.kernel)

    @property
    def steps(self) -> list[StepSummary]:
        """The removals so far, as listed in run.json."""
        return steps_of(self.all(StepRecord), self.all(RoundRecord), self.all(ResultRecord))

    @property
    def dense(self) -> ScoreRecord | None:
        """The first score of the dense model. Later kernel shapes can give other last bits."""
        return next((score for score in self.all(ScoreRecord) if score.phase == 0), None)

    def all(self, kind: type[RecordT]) -> list[RecordT]:
        return [record for record in self._records if isinstance(record, kind)]

    def sums(self, phase: int) -> Sums:
        """Return the loss sums of a phase from the ledger.

        If the kernel shape changed before the phase was complete, only those of the new shape are returned.
        """
        return Sums.of(self._units.get(phase, []))

    def spent(self, phase: int) -> tuple[int, float]:
        """Return the matmul FLOPs and the wall seconds of the units of a phase in all sessions."""
        return self._spent.get(phase, (0, 0.0))

    def append(self, record: Record) -> None:
        append_line(self._stream, record.to_line())
        self._take_in(record)

    def append_unit(self, phase: int, result: UnitResult[WorkUnit], wall_s: float) -> None:
        """Append a unit. wall_s: seconds since the previous unit of the phase, or since its start in this session."""
        unit = result.unit
        event = {
            "step": phase, "replica": result.replica, "start_s": result.start_s, "stop_s": result.stop_s,
            "seconds": result.seconds, "num_masks": len(unit.masks), "first": unit.first, "stop": unit.stop,
            "flops": unit.flops,
        }  # fmt: skip
        self.append_event("unit", event)
        record = UnitRecord.of(
            phase=phase, masks=[str(mask) for mask in unit.masks], first=unit.first, stop=unit.stop, sums=result.value,
            seconds=result.seconds, wall_s=wall_s, flops=unit.flops, replica=result.replica,
        )  # fmt: skip
        self.append(record)

    def append_event(self, kind: str, values: dict[str, Any]) -> None:
        """Append an event. It is not synced, because the run does not depend on events."""
        with suppress(OSError):
            self._events.write(json.dumps({"type": kind, **plain(values)}, allow_nan=False) + "\n")
            self._events.flush()

    def write_summary(self, summary: RunSummary) -> None:
        """Replace run.json and the other files that are derived from the ledger."""
        write_json(self.path / "run.json", summary)
        write_json(self.path / "sequence.json", official_sequence([block_of(step) for step in self.steps]))
        scores = [score.values() for score in self.all(ScoreRecord)]
        with replacing(self.path / "scores.parquet") as aside:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(scores, schema=_score_columns()), aside)

    def _take_in(self, record: Record) -> None:
        """Index a record, so that lookups do not have to scan the ledger."""
        self._records.append(record)
        if isinstance(record, StepRecord | RoundRecord):
            self.phases.append(record)
        if isinstance(record, UnitRecord):
            self._units.setdefault(record.phase, []).append(record)
            flops, wall_s = self.spent(record.phase)
            self._spent[record.phase] = flops + record.flops, wall_s + record.wall_s
        if isinstance(record, KernelRecord):
            done = {*range(1, len(self.phases) + 1), *(-audit.step for audit in self.all(AuditRecord))}
            self._units = {phase: units for phase, units in self._units.items() if phase in done}

    def _read(self) -> list[Record]:
        """Return all records. An incomplete last line is removed from the file."""
        if not self._ledger_path.exists():
            return []
        records, num_bytes = read_records(self._ledger_path)
        os.truncate(self._ledger_path, num_bytes)
        return records


def read_records(ledger: Path) -> tuple[list[Record], int]:
    """Return the records of a ledger and their size in bytes."""
    lines, num_bytes = parse_ledger(ledger)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(record_of(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged(ledger, number) from None
    return records, num_bytes


def _score_columns() -> pyarrow.Schema:
    values = dict.fromkeys(["nll", "perplexity", *sorted(metric.key for metric in Metric.all().values())])
    return pyarrow.schema(
        [
            ("step", pyarrow.int32()),
            ("block", pyarrow.string()),
            ("mask", pyarrow.string()),
            *((name, pyarrow.float64()) for name in values),
            ("num_windows", pyarrow.int32()),
            ("exact", pyarrow.bool_()),
            ("seconds", pyarrow.float64()),
            ("replica", pyarrow.string()),
        ]
    )
