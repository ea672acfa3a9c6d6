"""Base class of what a training changes in a model: how it is added, kept and merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from blockpruner.engine.options import Choice

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Trained(Choice):
    """Torch is imported only where a model is there."""

    package = "blockpruner.engine.recovery.trained"
    file: ClassVar[str]
    """Where a finished training keeps its result: a file or a folder in the folder of the training."""
    is_kept: ClassVar[bool]
    """Whether the result is of use beside the model into which it was merged."""

    lr: float
    """Learning rate of the first step. It decreases linearly to zero."""

    @abstractmethod
    def add(self, model: PreTrainedModel, *, projections: Collection[str], seed: int) -> nn.Module:
        """Return a module that computes what `model` computes, and in which only what is trained requires gradients.
        Before the first step its output is the model's.

        projections: names of the output projections within their layers, as `projection_names` returns them.
        """

    @abstractmethod
    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the result to `folder / file`. module: returned by `add`, and trained."""

    @abstractmethod
    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Add the result in a folder to the weights of `model`, in float32 and rounded once to the weights' dtype."""
