"""What two runs must agree on, however many replicas and sessions they had."""

from __future__ import annotations

from typing import Any

from blockpruner.searching.history import History
from blockpruner.searching.records import StepRecord, UnitRecord


def units_and_steps(history: History) -> tuple[dict[Any, float], list[Any]]:
    """All sums by phase, mask and window, and all steps, without times and names."""
    units = {
        (unit.phase, mask, window): value
        for unit in history.all(UnitRecord)
        for mask, row in zip(unit.masks, unit.sums, strict=True)
        for window, value in zip(range(unit.first, unit.stop), row, strict=True)
    }
    return units, [(step.step, step.block, step.nll) for step in history.all(StepRecord)]
