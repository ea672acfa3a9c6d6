"""What methods that remove whole layers and change output projections have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.compensation.projections import Projection, Weights, find_projections
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import keep_layers
from blockpruner.engine.work.shape import ModelShape

Projections = Mapping[Block, Projection]


def num_layers_for_ratio(shape: ModelShape, ratio: float, most: int) -> int:
    """Number of layers to remove, at least one and at most `most`, whose share of the parameters is nearest to
    `ratio`."""
    return min(range(1, most + 1), key=lambda number: abs(ratio_of(shape, number) - ratio))


def ratio_of(shape: ModelShape, num_layers: int) -> float:
    """Share of the parameters in `num_layers` layers of mean size."""
    layers = Mask.of(Block(Kind.LAYER, layer) for layer in range(shape.num_layers))
    return shape.ratio(layers) * num_layers / shape.num_layers


def plain_projections(decoder: Decoder, blocks: Sequence[Block] | None = None) -> Projections:
    """Return the output projections of some blocks (None: all).

    Raises UserError if one is unknown, or if a norm follows it: then it cannot take up a change of the output.
    """
    found = find_projections(decoder)
    plain = {}
    for block in found if blocks is None else blocks:
        projection = found[block]
        reason = "a norm follows its output projection" if not isinstance(projection, str) else projection
        if isinstance(projection, str) or projection.gain is not None:
            raise UserError(
                f"expected blocks whose output comes from one linear layer, got a model of type "
                f"{decoder.model.config.model_type!r}, in which that of {block} does not: {reason}."
            )
        plain[block] = projection
    return plain


def with_changed(
    decoder: Decoder, layers: Sequence[int], projections: Projections, changed: Mapping[Block, Weights]
) -> PreTrainedModel:
    """Return the model with only the given layers, and with other weights in some output projections. It shares all
    other weights. Raises UserError as `keep_layers`."""
    path = decoder.architecture.layers
    model = keep_layers(decoder.model, layers)
    for block, weights in changed.items():
        inside = projections[block].name.removeprefix(f"{path}.{block.layer}.")
        module = model.get_submodule(f"{path}.{layers.index(block.layer)}.{inside}")
        module.weight = nn.Parameter(weights.weight.to(decoder.model.dtype), requires_grad=False)
        if weights.bias is not None:
            module.bias = nn.Parameter(weights.bias.to(decoder.model.dtype), requires_grad=False)
    return model
