"""A frozen model that runs with changes of some weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ChangedWeights(nn.Module):
    """Its only parameters are the changes, so that an optimizer and checkpoints hold nothing else."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        """names: weights of the model to change. The changes are zero at first."""
        super().__init__()
        self._frozen = (model.eval().requires_grad_(False),)  # in a tuple: it must not become a submodule
        self._names = list(names)
        zeros = (torch.zeros_like(weight, dtype=_wide(weight)) for weight in map(model.get_parameter, names))
        self.changes = nn.ParameterList(nn.Parameter(change) for change in zeros)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        (model,) = self._frozen
        weights = {name: plus(model.get_parameter(name), change) for name, change in self._changes()}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return torch.func.functional_call(model, weights, kwargs=inputs)

    def by_name(self) -> dict[str, Tensor]:
        return {name: change.detach().cpu() for name, change in self._changes()}

    def _changes(self) -> zip[tuple[str, Tensor]]:
        return zip(self._names, self.changes, strict=True)


def plus(weight: Tensor, change: Tensor) -> Tensor:
    """Add a change in its own dtype, and round once to that of the weight."""
    return (weight.to(change.dtype) + change.to(weight.device)).to(weight.dtype)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
