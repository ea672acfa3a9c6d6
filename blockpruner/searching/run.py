"""The run directory. The ledger is the source of truth, and everything else is derived from it.

ledger.jsonl contains one record per line (`records.py`), flushed and synced. events.jsonl is for information only: it
lists when and where each unit ran, and what happened to replicas. A session that appends nothing to the ledger, such as
a resume that is refused, changes no file.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.scoring.scorer import UnitResult
from blockpruner.engine.work.units import WorkUnit
from blockpruner.files import lock_folder, plain, replacing, write_json
from blockpruner.searching.content import RunSummary
from blockpruner.searching.history import History, records_of
from blockpruner.searching.ledger import Ledger
from blockpruner.searching.records import Record, ScoreRecord, UnitRecord
from blockpruner.searching.sequence import official_sequence
from blockpruner.searching.steps import block_of


class RunDirectory(History):
    """An open run directory. Only one process at a time can own it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._events_path = path / "events.jsonl"
        self._events: TextIO | None = None
        self._waiting: list[str] = []
        """Events of this session before its first record."""
        self._lock = lock_folder(path)
        try:
            self._ledger = Ledger(path / "ledger.jsonl")
        except OSError as error:
            self._lock.release()
            raise UserError(f"cannot write {error.filename!r}: {error.strerror}; choose another `out`.") from error
        except BaseException:
            self._lock.release()
            raise
        try:
            for record in records_of(self._ledger.lines, path / "ledger.jsonl"):
                self.take_in(record)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self.header is None:  # nothing has begun: restore the folder as it was
            (self.path / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # it may contain other files, such as a table of times
                self.path.rmdir()

    def _close(self) -> None:
        with suppress(OSError):  # a full disk was already reported during the write
            self._ledger.close()
        with suppress(OSError):
            if self._events is not None:
                self._events.close()
        self._lock.release()

    @property
    def has_grown(self) -> bool:
        """Whether this session has appended a record."""
        return self._ledger.has_grown

    def append(self, record: Record) -> None:
        self._ledger.append(record.to_line())
        self.take_in(record)
        self._write_events()

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
        self._waiting.append(json.dumps({"type": kind, **plain(values)}, allow_nan=False) + "\n")
        if self.has_grown:
            self._write_events()

    def _write_events(self) -> None:
        with suppress(OSError):
            if self._events is None:
                if self._events_path.exists() and not self._events_path.is_file():  # a pipe would wait for a reader
                    return
                self._events = self._events_path.open("a", encoding="utf-8")
            self._events.writelines(self._waiting)
            self._waiting = []
            self._events.flush()

    def write_summary(self, summary: RunSummary) -> None:
        """Replace run.json and the other files that are derived from the ledger."""
        write_json(self.path / "run.json", summary)
        write_json(self.path / "sequence.json", official_sequence([block_of(step) for step in self.steps]))
        scores = [score.values() for score in self.all(ScoreRecord)]
        with replacing(self.path / "scores.parquet") as aside:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(scores, schema=score_columns()), aside)


def score_columns() -> pyarrow.Schema:
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
