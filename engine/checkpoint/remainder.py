"""What is left of a pruned model, in the dense model's own names: every format is written from this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import PRUNED_PREFIX, Architecture, architecture_of
from blockpruner.engine.model.pruned_classes import source_config
from blockpruner.engine.model.surgery import source_name


@dataclass(frozen=True)
class Layer:
    """A layer to write: the source layers that its attention and its MLP come from, or None where one is missing."""

    attention: int | None
    mlp: int | None

    @property
    def source(self) -> int:
        """Where its attention comes from, or its MLP if it has no attention."""
        found = self.mlp if self.attention is None else self.attention
        assert found is not None
        return found


@dataclass(frozen=True)
class Remainder:
    config: PreTrainedConfig
    """The dense model's."""
    architecture: Architecture
    weights: dict[str, Tensor]
    """The kept tensors, by the names that they have in the dense model."""
    blocks: tuple[Layer, ...]
    """The kept blocks, one each, in the order in which the stream passes them."""

    def layers(self, *, sequential: bool = True) -> list[Layer]:
        """The blocks as layers of an attention and an MLP, as few as can be.

        An attention that lost its MLP and an MLP that lost its attention become one layer where the MLP comes next in
        the stream. That is exact where a layer's MLP reads what its attention wrote (`sequential`).
        """
        layers: list[Layer] = []
        for block in self.blocks:
            last = layers[-1] if layers else Layer(None, None)
            joins = last.attention is not None and last.mlp is None and block.mlp is not None
            if joins and (sequential or last.attention == block.mlp):
                layers[-1] = Layer(last.attention, block.mlp)
            else:
                layers.append(block)
        return layers

    def parts(self, layer: int) -> dict[str, Tensor]:
        """The kept tensors of a source layer, by their names within the layer."""
        prefix = f"{self.architecture.layers}.{layer}."
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}

    @property
    def outside(self) -> dict[str, Tensor]:
        """The tensors that belong to no layer."""
        prefix = f"{self.architecture.layers}."
        return {name: value for name, value in self.weights.items() if not name.startswith(prefix)}

    def is_of(self, name: str, kind: str) -> bool:
        """Whether a layer's tensor belongs to its "attention" or to its "mlp" alone."""
        names = self.architecture
        if kind == "attention":
            owners = (names.attention, *names.attention_norms)
        else:
            owners = (*names.mlp_modules, *names.mlp_norms)
        return any(name.startswith(f"{owner}.") for owner in owners)


def what_is_left(pruned: PreTrainedModel) -> Remainder:
    """Of a model that `surgery.prune` made. Raises UserError for one that brought its own code: only the grouped format
    carries that along."""
    values: dict[str, Any] = pruned.config.to_dict()
    model_type = str(values["model_type"]).removeprefix(PRUNED_PREFIX)
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"expected a model type that transformers knows, got {model_type!r}; use --format grouped.")
    config = source_config(model_type, values)
    with torch.device("meta"):
        architecture = architecture_of(AutoModelForCausalLM.from_config(config))
    groups = values["block_groups"]
    blocks: list[Layer] = []
    for group in groups:
        blocks += [Layer(None, layer) for layer in group["pre"]]
        blocks.append(Layer(group["attention"], None))
        blocks += [Layer(None, group["attention"])] if group["mlp"] else []
        blocks += [Layer(None, layer) for layer in group["post"]]
    weights = {source_name(name, architecture.layers, groups): value for name, value in pruned.state_dict().items()}
    return Remainder(config, architecture, weights, tuple(blocks))
