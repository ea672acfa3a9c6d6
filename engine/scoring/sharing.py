"""Units of a search that need something large beside the model, which is the same for many of them.

A unit names it as `shared`, and a scorer sends it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer, UnitResult
from blockpruner.engine.work.units import WorkUnit

SharedT = TypeVar("SharedT")


@dataclass(frozen=True, eq=False)
class SharingUnit(Generic[SharedT]):
    """Score masks with what is shared."""

    unit: WorkUnit
    shared: SharedT | None

    @property
    def flops(self) -> float:
        return self.unit.flops

    @property
    def home(self) -> None:
        return None

    def __str__(self) -> str:
        return str(self.unit)


def run_wrapped(scorer: Scorer, units: Sequence[Any]) -> Iterator[UnitResult[Any] | OutOfMemory[Any]]:
    """Run units that each hold another one, and yield results with those."""
    for result in scorer.run(units):
        yield replace(result, unit=result.unit.unit)
