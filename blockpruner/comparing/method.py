"""The base class of compared methods.

All methods search or rank on the same calibration windows. A method is a class in `methods/`, derived from one of three
kinds (`searched.py`, `ranked.py`, `rebuilt.py`).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from blockpruner.engine.options import Choice
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Clock:
    """Measures the time since the process of a method began."""

    began_s: float
    """Seconds since the epoch."""
    startup_s: float
    """Seconds until the method is called: Python and its imports."""
    load_s: float = 0.0
    """Seconds from then until the first pass over the text: starting Ray, loading the model and the calibration
    windows, and in a search also the test whether larger calls give the same bits."""

    @classmethod
    def since(cls, began_s: float) -> Self:
        return cls(began_s, time.time() - began_s)

    def loaded(self, at_s: float | None = None) -> None:
        self.load_s = (at_s or time.time()) - self.began_s - self.startup_s

    def search_s(self, at_s: float | None = None) -> float:
        """Return the seconds since loading ended."""
        return (at_s or time.time()) - self.began_s - self.startup_s - self.load_s

    @property
    def total_s(self) -> float:
        return time.time() - self.began_s


class Method(Choice):
    """A pruning method. It runs in its own process, and its time is measured from the start of that process."""

    package = "blockpruner.comparing.methods"
    rebuilds: ClassVar[bool] = False
    """Whether the pruned model has new weights. Then each ratio is a separate run that writes a checkpoint."""
    is_nested: ClassVar[bool] = True
    """Whether one removal order serves all ratios. Otherwise each ratio is a separate run."""

    @abstractmethod
    def told(self, common: SearchConfig, num_layers: int) -> SearchConfig:
        """Return the options of the method.

        common: model, calibration, replicas, the largest ratio, and the strategy of step-by-step searches.
        """

    @abstractmethod
    def check(self, told: SearchConfig, model: PreTrainedModel, shape: ModelShape) -> None:
        """Raise UserError if the method does not support the model or cannot reach `told.ratio`.

        model: the model without weights.
        """

    @abstractmethod
    def run(self, told: SearchConfig, folder: Path, reporter: Reporter, clock: Clock) -> dict[str, Any]:
        """Prune to `told.ratio`.

        Returns `steps`, each with block, ratio, search_s and work_flops. A method that rebuilds writes
        `folder`/checkpoint and returns its ratio, search_s and work_flops. Additional values are recorded as well.

        clock: the method must call `clock.loaded` when loading is complete.
        """
