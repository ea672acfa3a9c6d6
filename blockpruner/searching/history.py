"""The records of a run in memory, indexed, and checked to fit together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from blockpruner.engine.blocks import Block, Mask, are_removals
from blockpruner.engine.work.units import KernelShape
from blockpruner.searching.content import StepSummary
from blockpruner.searching.ledger import damaged, parse_ledger
from blockpruner.searching.records import (
    AuditRecord,
    CompensationRecord,
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
from blockpruner.searching.steps import steps_of

RecordT = TypeVar("RecordT", bound=Record)


class History:
    """What a ledger says."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self.phases: list[PhaseRecord] = []
        """Completed steps and rounds."""
        self._units: dict[int, list[UnitRecord]] = {}
        self._spent: dict[int, tuple[int, float]] = {}

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

    def refit(self, before: int) -> CompensationRecord | None:
        """Return the last refit before a step, whose weights that step's candidates have; None: the dense model's."""
        refits = self.all(CompensationRecord)
        return next((record for record in reversed(refits) if record.step < before and record.is_used), None)

    def spent(self, phase: int) -> tuple[int, float]:
        """Return the matmul FLOPs and the wall seconds of the units of a phase in all sessions."""
        return self._spent.get(phase, (0, 0.0))

    def take_in(self, record: Record) -> None:
        """Index a record, so that lookups do not have to scan the ledger."""
        self._records.append(record)
        if isinstance(record, StepRecord | RoundRecord):
            self.phases.append(record)
        if isinstance(record, UnitRecord):
            self._units.setdefault(record.phase, []).append(record)
            flops, wall_s = self.spent(record.phase)
            self._spent[record.phase] = flops + record.flops, wall_s + record.wall_s
        if isinstance(record, CompensationRecord):  # a part of its step
            flops, wall_s = self.spent(record.step)
            self._spent[record.step] = flops + record.work_flops, wall_s + record.wall_s
        if isinstance(record, KernelRecord):
            done = {*range(1, len(self.phases) + 1), *(-audit.step for audit in self.all(AuditRecord))}
            self._units = {phase: units for phase, units in self._units.items() if phase in done}


def read_history(ledger: Path) -> History:
    """Read a ledger. Raises UserError if a line is damaged or does not fit those before it."""
    lines, _ = parse_ledger(ledger)
    history = History()
    for record in records_of(lines, ledger):
        history.take_in(record)
    return history


def records_of(lines: Iterable[dict[str, Any]], ledger: Path) -> list[Record]:
    """Return the records of the lines of a ledger. Raises UserError naming the first line that does not fit."""
    records: list[Record] = []
    order = _Order()
    for number, line in enumerate(lines, start=1):
        try:
            record = record_of(line)
            order.add(record)
        except ValueError as error:
            raise damaged(ledger, number, str(error)) from error
        records.append(record)
    return records


class _Order:
    """Checks what the chain of a ledger cannot show where there is none: that its records follow each other."""

    def __init__(self) -> None:
        self._num_windows: int | None = None
        self._numbers = {StepRecord: 0, RoundRecord: 0}
        self._removed = Mask()

    def add(self, record: Record) -> None:
        """Raises ValueError if the record does not fit those before it."""
        if isinstance(record, RunRecord) != (self._num_windows is None):
            raise ValueError("expected one record of the run, in the first line")
        if isinstance(record, RunRecord):
            self._num_windows = int(record.calibration["num_windows"])
        elif isinstance(record, UnitRecord):
            assert self._num_windows is not None
            if record.stop > self._num_windows:
                raise ValueError(f"window {record.stop - 1} of {self._num_windows}")
        elif isinstance(record, StepRecord):
            self._count(StepRecord, record.step)
            self._remove(record.removed)
        elif isinstance(record, RoundRecord):
            self._count(RoundRecord, record.round)
        elif isinstance(record, ResultRecord):
            blocks = [Block.from_json(step["block"]) for step in record.steps]
            if not are_removals(blocks):
                raise ValueError("a block is removed twice")

    def _count(self, kind: type[StepRecord] | type[RoundRecord], number: int) -> None:
        self._numbers[kind] += 1
        if number != self._numbers[kind]:
            raise ValueError(f"expected {kind.type} {self._numbers[kind]}, got {number}")

    def _remove(self, block: Block) -> None:
        if not self._removed.can_lose(block):
            raise ValueError(f"{block} {'is removed twice' if block.part is None else 'cannot go next'}")
        self._removed = self._removed.without(block)
