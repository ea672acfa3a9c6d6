"""The remaining blocks of a pruned model, under the dense model's tensor names. All formats are written from this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import PRUNED_PREFIX, architecture_of
from blockpruner.engine.model.classes.pruned import WIDTHS, source_config
from blockpruner.engine.model.rows import Architecture
from blockpruner.engine.model.surgery import source_name


@dataclass(frozen=True)
class Layer:
    """A layer to write: the source layers of its attention and its MLP, or None for a missing block."""

    attention: int | None
    mlp: int | None

    @property
    def source(self) -> int:
        """Source layer of the attention, or of the MLP if there is no attention."""
        found = self.mlp if self.attention is None else self.attention
        assert found is not None
        return found


@dataclass(frozen=True)
class Remainder:
    config: PreTrainedConfig
    """Config of the dense model."""
    architecture: Architecture
    weights: dict[str, Tensor]
    """Kept tensors, by their names in the dense model."""
    blocks: tuple[Layer, ...]
    """Kept blocks, one per entry, in the order in which the stream passes them."""
    widths: Mapping[int, int] = field(default_factory=dict)
    """Numbers of channels of those MLPs that have fewer than in the dense model, by source layer."""
    kv_heads: Mapping[int, int] = field(default_factory=dict)
    """Numbers of KV heads of those attentions that have fewer than in the dense model, by source layer."""

    def layers(self, *, sequential: bool = True) -> list[Layer]:
        """Combine the blocks into as few layers of an attention and an MLP as possible.

        An attention without its MLP and an MLP without its attention become one layer if the MLP follows directly in
        the stream. This is exact for decoders whose MLP reads the output of the attention (`sequential`).
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
        """Return the kept tensors of a source layer, by their names within the layer."""
        prefix = f"{self.architecture.layers}.{layer}."
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}

    @property
    def outside(self) -> dict[str, Tensor]:
        """Tensors that belong to no layer."""
        prefix = f"{self.architecture.layers}."
        return {name: value for name, value in self.weights.items() if not name.startswith(prefix)}

    def is_of(self, name: str, kind: str) -> bool:
        """Whether a tensor of a layer belongs only to its "attention", or only to its "mlp"."""
        names = self.architecture
        if kind == "attention":
            owners = (*names.mixers, *names.mixer_norms)
        else:
            owners = (*(names.inline_mlp or names.mlps), *names.mlp_norms)
        return any(name.startswith(f"{owner}.") for owner in owners)


def dense_of(config: PreTrainedConfig) -> tuple[PreTrainedConfig, Architecture]:
    """Return the config of the dense model, from its own or a pruned one's, and the names of its blocks. Raises
    UserError for a model that only the grouped format can express, like one with its own code."""
    values: dict[str, Any] = config.to_dict()
    model_type = str(values["model_type"]).removeprefix(PRUNED_PREFIX)
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"expected a model type that transformers knows, got {model_type!r}; use `format=grouped`.")
    if values["model_type"] != model_type:
        config = source_config(model_type, values)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config)
        architecture = architecture_of(dense)
    if architecture.gives_more(dense):
        raise UserError(
            f"expected a model whose layers are given their stream alone, got one of type {model_type!r}, whose layers "
            f"are given values of the tokens, too, or what earlier ones left; use `format=grouped`."
        )
    return config, architecture


def what_is_left(pruned: PreTrainedModel) -> Remainder:
    """Return the remainder of a model from `surgery.prune`. Raises UserError for a model that only the grouped format
    can express."""
    config, architecture = dense_of(pruned.config)
    values = pruned.config.to_dict()
    groups = values["block_groups"]
    if any(group.get("empty") for group in groups):
        raise UserError(
            f"expected a model whose layers are nothing but their blocks, got one of type {config.model_type!r} with "
            f"layers of which both blocks are gone; use `format=grouped`."
        )
    blocks: list[Layer] = []
    for group in groups:
        blocks += [Layer(None, layer) for layer in group["pre"]]
        blocks.append(Layer(group["attention"], None))
        blocks += [Layer(None, group["attention"])] if group["mlp"] else []
        blocks += [Layer(None, layer) for layer in group["post"]]
    weights = {source_name(name, architecture.layers, groups): value for name, value in pruned.state_dict().items()}
    widths, kv_heads = ({int(n): width for n, width in (values.get(name) or {}).items()} for name in WIDTHS)
    return Remainder(config, architecture, weights, tuple(blocks), widths, kv_heads)
