"""Blocks out of a model in memory: the pruned model shares the dense one's weights and lacks the modules that went."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from engine.blocks import Kind, Mask
from engine.errors import UserError
from engine.families import PRUNED_CLASSES

Group = dict[str, Any]


def group_blocks(mask: Mask, num_layers: int) -> list[Group]:
    """What is left, as one group per kept attention: MLPs without an attention of their own join the attention before
    them (`post`) or, before the first one, after them (`pre`). Layers that lost both blocks disappear.

    Raises UserError if no attention would be left: KV caches and positions need one.
    """
    groups: list[Group] = []
    early: list[int] = []
    for layer in range(num_layers):
        mlp = mask.keeps(Kind.MLP, layer)
        if mask.keeps(Kind.MHA, layer):
            groups.append({"pre": early, "attention": layer, "mlp": mlp, "post": []})
            early = []
        elif mlp:
            (groups[-1]["post"] if groups else early).append(layer)
    if not groups:
        raise UserError(f"expected a mask that keeps at least one of the {num_layers} attention blocks, got {mask}.")
    return groups


def prune(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """A model without the mask's blocks. Its weights are the dense model's own tensors, not copies."""
    num_layers = model.config.num_hidden_layers
    too_deep = [str(block) for block in mask.absent if block.layer >= num_layers]
    if too_deep:
        raise UserError(f"expected blocks of a model with {num_layers} layers, got {', '.join(sorted(too_deep))}.")
    groups = group_blocks(mask, num_layers)
    config_class, model_class = PRUNED_CLASSES[model.config.model_type]
    values = model.config.to_dict()
    for key in ("model_type", "architectures", "_name_or_path", "transformers_version"):
        values.pop(key, None)
    values |= {
        "num_hidden_layers": len(groups),
        "source_num_hidden_layers": num_layers,
        "block_groups": groups,
    }
    with torch.device("meta"), no_init_weights():
        pruned = model_class(config_class(**values))
    pruned.config._attn_implementation = model.config._attn_implementation

    def source(name: str) -> str:
        return _source_name(name, groups)

    weights = model.state_dict()
    pruned.load_state_dict({name: weights[source(name)] for name in pruned.state_dict()}, assign=True)
    pruned.tie_weights()
    _copy_buffers(model, pruned, source)
    pruned.generation_config = model.generation_config
    return pruned.eval()


def _source_name(name: str, groups: list[Group]) -> str:
    """Name of a tensor of the pruned model to its name in the dense one."""
    match = re.search(r"\.layers\.(\d+)\.(?:(pre|post)\.(\d+)\.)?", name)
    if match is None:
        return name
    group = groups[int(match[1])]
    layer = group[match[2]][int(match[3])] if match[2] else group["attention"]
    return f"{name[: match.start()]}.layers.{layer}.{name[match.end() :]}"


def _copy_buffers(model: PreTrainedModel, pruned: PreTrainedModel, source: Callable[[str], str]) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) were not computed on the meta device."""
    buffers: dict[str, Tensor] = dict(model.named_buffers())
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            pruned.get_submodule(owner)._buffers[leaf] = buffers[source(name)]
