"""Read and replace the output projections of a pruned model, under the names of the dense model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.compensation.projections import Weights, weights_in
from blockpruner.engine.compensation.stages import FittedStage
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.surgery import source_name


def weights_of(pruned: PreTrainedModel, stages: Iterable[FittedStage], layers: str) -> dict[Block, Weights]:
    """Return the weights of all projections to fit, as a model from `surgery.prune` has them. layers: path of the list
    of layers in the dense model."""
    modules = _modules(pruned, layers)
    return {
        block: weights_in(modules[name])
        for stage in stages
        for block, name in zip(stage.blocks, stage.names, strict=True)
    }


@torch.no_grad()
def put_changed(pruned: PreTrainedModel, stages: Iterable[FittedStage], layers: str, changed: Changed) -> None:
    """Replace weights of a model from `surgery.prune`. Tensors that it shares with the dense model stay as they are."""
    modules = _modules(pruned, layers)
    for stage in stages:
        for block, name in zip(stage.blocks, stage.names, strict=True):
            if block in changed:
                weights = changed[block]
                modules[name].weight = nn.Parameter(weights.weight, requires_grad=False)
                if weights.bias is not None:
                    modules[name].bias = nn.Parameter(weights.bias, requires_grad=False)


def mask_of(pruned: PreTrainedModel) -> Mask:
    """Return the mask of a model from `surgery.prune`. Raises UserError for any other model."""
    groups = getattr(pruned.config, "block_groups", None)
    if groups is None:
        raise UserError(
            f"expected a model that `prune` returned, got one of type {pruned.config.model_type!r} with all of its "
            f"blocks."
        )
    kept = {Block(Kind.MHA, group["attention"]) for group in groups}
    kept |= {Block(Kind.MLP, group["attention"]) for group in groups if group["mlp"]}
    kept |= {Block(Kind.MLP, layer) for group in groups for layer in (*group["pre"], *group["post"])}
    kept -= {Block(Kind.MLP, layer) for group in groups for layer in group.get("empty", ())}
    blocks = Granularity.MIX.candidates(pruned.config.source_num_hidden_layers)
    return Mask.of(block for block in blocks if block not in kept)


def _modules(pruned: PreTrainedModel, layers: str) -> dict[str, nn.Module]:
    groups = pruned.config.block_groups
    return {source_name(name, layers, groups): module for name, module in pruned.named_modules()}
