"""The output projections of the blocks, in full: the weights that a compensation fits.

What is trained is the change of each weight, in float32 or wider. The model runs with the sum, rounded to its own
dtype, which is what is written at the end. The model itself stays as it is, without dropout.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from blockpruner.engine.errors import UserError
from blockpruner.engine.recovery.what import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Projections(Trained):
    name = "projections"
    about = "the full output projections of all blocks, the weights that compensate fits"
    file = "changes.safetensors"
    is_kept = False

    lr: float = Field(default=5e-5, gt=0)
    """Learning rate of the first step. It decreases linearly to zero."""

    def add(self, model: PreTrainedModel, *, projections: Collection[str], seed: int) -> Any:
        from blockpruner.engine.recovery.changed_weights import ChangedWeights

        ends = "|".join(re.escape(f".{name}.weight") for name in sorted(projections))
        names = [name for name, _ in model.named_parameters() if ends and re.search(rf"\.\d+({ends})$", name)]
        if not names:
            raise UserError(
                "expected blocks with an output projection for `train=projections`, found none; use `train=adapters`."
            )
        return ChangedWeights(model, names)

    def save(self, module: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(module.by_name(), folder / self.file)

    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        from safetensors.torch import load_file

        from blockpruner.engine.recovery.changed_weights import plus

        for name, change in load_file(folder / self.file).items():
            weight = model.get_parameter(name)
            weight.data = plus(weight.data, change)  # a new tensor: the old one may be mapped from a file
        return model
