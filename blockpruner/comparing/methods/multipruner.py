"""MultiPruner (arXiv 2501.09949). `engine/strategies/multipruner.py` says how it differs from its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from blockpruner.comparing.searched import Searched
from blockpruner.engine.blocks import Units
from blockpruner.engine.strategies import multipruner
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MultiPruner(Searched):
    name = "multipruner"
    about = multipruner.MultiPruner.about
    is_nested = False
    changes: ClassVar[Mapping[str, Any]] = {"strategy": multipruner.MultiPruner(), "units": Units.ALL}

    def check(self, told: SearchConfig, model: PreTrainedModel, shape: ModelShape) -> None:
        multipruner.check_narrowable(shape)
        super().check(told, model, shape)
