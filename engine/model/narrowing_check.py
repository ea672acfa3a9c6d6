"""Whether channels can be removed from MLPs: tried on a few tokens against the whole module with zeros for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockpruner.engine.blocks import NUM_GROUPS
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import NUM_TOKENS, is_close
from blockpruner.engine.model.outputs import failures_told
from blockpruner.engine.model.selecting import RowChoice


@torch.inference_mode()
def check_narrowable(decoder: Decoder) -> None:
    """Check for each MLP whose channels can be removed, by the names of its linear layers, that its module on slices of
    its weights gives what the whole module gives with zeros for the other channels. Raises UserError if not, or if
    there is no such MLP.

    Costs two passes over a few tokens.
    """
    name = f"model type {decoder.model.config.model_type!r}"
    if not decoder.narrow:
        raise UserError(
            f"{name} has no MLP whose channels can be removed: they are experts, are computed by the layer itself, or "
            f"their linear layers have unknown names; use `units=blocks`."
        )
    with failures_told(f"channels of MLPs cannot be removed from {name}, which fails with"):
        _check(decoder, name)


def _check(decoder: Decoder, name: str) -> None:
    ids = torch.arange(2 * NUM_TOKENS, device=decoder.device).view(2, -1) % decoder.model.config.vocab_size
    stream = decoder.embed(ids)
    with decoder.selective():
        for layer, device in enumerate(decoder.layer_devices):
            stream = stream.to(device)
            if layer in decoder.narrow:
                _check_mlp(decoder, layer, stream, name)
            stream = decoder.run_layer(layer, stream)


def _check_mlp(decoder: Decoder, layer: int, stream: Tensor, name: str) -> None:
    none, whole = RowChoice.nobody(stream), RowChoice.of_groups(stream, NUM_GROUPS)
    num_groups = NUM_GROUPS // 2
    width = decoder.shape.mlp[layer].width(num_groups)
    narrower = RowChoice.of_groups(stream, num_groups)
    found = decoder.run_layer(layer, stream, attention=none, mlp=narrower)
    dense = decoder.run_layer(layer, stream, attention=none, mlp=whole)

    def without_others(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = torch.arange(args[0].shape[-1], device=args[0].device) < width
        return (torch.where(kept, args[0], torch.zeros_like(args[0])), *args[1:])

    handle = decoder.narrow[layer].outward.register_forward_pre_hook(without_others)
    try:
        expected = decoder.run_layer(layer, stream, attention=none, mlp=whole)
    finally:
        handle.remove()
    if not is_close(found, expected, (expected - dense).double().norm()):
        raise UserError(
            f"{name}: with {width} of the channels of its MLP, layer {layer} does not give what it gives with zeros "
            f"for the others, so channels cannot be removed; use `units=blocks`."
        )
