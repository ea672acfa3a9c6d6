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
from blockpruner.engine.model.classes.pruned import WIDTHS
from blockpruner.engine.model.surgery import source_name
from blockpruner.engine.work.shape import ModelShape


def weights_of(pruned: PreTrainedModel, stages: Iterable[FittedStage], layers: str) -> dict[Block, Weights]:
    """Return the weights of all projections to fit, as a model from `surgery.prune` has them, on the CPU, where fits
    are solved. layers: path of the list of layers in the dense model."""
    modules = _modules(pruned, layers)
    return {
        block: _moved(weights_in(modules[name]), torch.device("cpu"))
        for stage in stages
        for block, name in zip(stage.blocks, stage.names, strict=True)
    }


@torch.no_grad()
def put_changed(pruned: PreTrainedModel, stages: Iterable[FittedStage], layers: str, changed: Changed) -> None:
    """Replace weights of a model from `surgery.prune`, wherever the new ones lie. Tensors that it shares with the dense
    model stay as they are."""
    modules = _modules(pruned, layers)
    for stage in stages:
        for block, name in zip(stage.blocks, stage.names, strict=True):
            if block in changed:
                weights = _moved(changed[block], weights_in(modules[name]).weight.device)
                modules[name].weight = nn.Parameter(weights.weight, requires_grad=False)
                if weights.bias is not None:
                    modules[name].bias = nn.Parameter(weights.bias, requires_grad=False)


def _moved(weights: Weights, device: torch.device) -> Weights:
    return weights.to(device, weights.weight.dtype)


def mask_of(pruned: PreTrainedModel, shape: ModelShape) -> Mask:
    """Return the mask of a model from `surgery.prune`. shape: that of the dense model. Raises UserError for any other
    model."""
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
    absent = [block for block in blocks if block not in kept]
    for name, kind in WIDTHS.items():
        for layer, width in (getattr(pruned.config, name, None) or {}).items():
            groups = shape.groups(block := Block(kind, int(layer)))
            absent += groups[: next(number for number in range(len(groups) + 1) if shape.width(block, number) == width)]
    return Mask.of(absent)


def _modules(pruned: PreTrainedModel, layers: str) -> dict[str, nn.Module]:
    groups = pruned.config.block_groups
    return {source_name(name, layers, groups): module for name, module in pruned.named_modules()}
