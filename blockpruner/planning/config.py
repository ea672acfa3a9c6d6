"""The options of a plan: those of the search, and the machines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator

from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Options
from blockpruner.engine.search.budget import Budget
from blockpruner.searching.config import SearchConfig


class Machines(Options):
    """Machines"""

    gpus: str | None = Field(default=None, examples=["2x24GB"])
    """Number and memory of the GPUs in one node. Default: the CPUs of this machine."""
    nodes: int = Field(default=1, ge=1)
    """Number of nodes with these GPUs."""
    tflops: float | None = Field(default=None, gt=0)
    """Speed of one replica on its device in TFLOP/s."""
    measure: bool = False
    """Measure the speed on this machine with random weights."""

    @model_validator(mode="after")
    def _check_machines(self) -> Self:
        if self.tflops is not None and self.measure:
            raise UserError("expected either `tflops` or `measure`, and not both.")
        self.fleet  # noqa: B018 - raises UserError if it cannot be parsed
        return self

    @property
    def fleet(self) -> Gpus | None:
        return None if self.gpus is None else Gpus.parse(self.gpus, self.nodes)


@dataclass(frozen=True)
class Gpus:
    per_node: int
    memory_bytes: int
    num_nodes: int

    @classmethod
    def parse(cls, text: str, num_nodes: int) -> Self:
        """Parse text such as `2x24GB`: two GPUs with 24 GB (10^9 bytes; GiB for 2^30) in each node."""
        found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*(GB|GiB|G)", text.strip(), flags=re.IGNORECASE)
        if found is None or int(found[1] or 1) == 0 or float(found[2]) == 0:
            raise UserError(f"expected `gpus` like 2x24GB (number x memory), got {text!r}.")
        unit = 2**30 if found[3].lower() == "gib" else 10**9
        return cls(int(found[1] or 1), int(float(found[2]) * unit), num_nodes)


class PlanConfig(Machines, SearchConfig):
    """Search options have the same meaning as in a search, so a search command can be planned without changes."""

    num_windows: int | None = Field(default=13, ge=1)
    """Number of calibration windows. The default 13 corresponds to 256 rows of Alpaca."""

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, values: Any) -> Any:
        if isinstance(values, dict) and all(values.get(name) is None for name in Budget.model_fields):
            return {**values, "ratio": 0.25}
        return values
