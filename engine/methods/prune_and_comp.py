"""Prune&Comp (arXiv 2507.18212): layers are removed one by one, and after each the stream is brought back to its size.

- The layer to remove is the one that turns the stream least (block influence), measured again after each removal.
- alpha is the mean over channels and windows of mean |t| / mean |s|, with s the stream before the removed layer, t the
  one after it, and means over the tokens of a window (magcomp.py of the published code).
- The published code multiplies the embedding and all earlier output projections by alpha, or, with a tied embedding,
  divides the later ones. The two are the same but for the epsilon of norms, because norms divide by the size of the
  stream; here the later ones are divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.compensation.projections import Weights
from blockpruner.engine.methods.fewer_layers import plain_projections, with_changed
from blockpruner.engine.model.decoder import Decoder


@dataclass(frozen=True)
class Rescaled:
    model: PreTrainedModel
    removed: list[int]
    """Removed layers, in this order."""
    factors: list[float]
    """alpha of each."""
    work_flops: int
    """FLOPs of all matmuls over the text."""


@torch.inference_mode()
def prune_and_comp(
    decoder: Decoder, windows: Tensor, *, num_remove: int, on_window: Callable[[], None] = lambda: None
) -> Rescaled:
    """Remove layers. windows: token ids [num_windows, seq_len]. on_window: called after each window of each removal.

    Raises UserError if the output of a block cannot be scaled in its output projection.
    """
    projections = plain_projections(decoder)
    factors: dict[int, float] = {}
    work_flops, seq_len = 0, windows.shape[1]
    for _ in range(num_remove):
        kept = [layer for layer in range(len(decoder.layers)) if layer not in factors]
        turned, grown = dict.fromkeys(kept, 0.0), dict.fromkeys(kept, 0.0)
        for window in windows:
            stream = decoder.embed(window[None].to(decoder.device))
            for layer in range(len(decoder.layers)):
                if layer in factors:
                    stream = stream * factors[layer]
                    continue
                before, stream = stream.double(), decoder.run_layer(layer, stream)
                after = stream.double()
                turned[layer] += (1 - F.cosine_similarity(before, after, dim=-1)).mean().item()
                grown[layer] += (after.abs().mean(1) / before.abs().mean(1)).mean().item()
            on_window()
        work_flops += len(windows) * sum(
            decoder.shape.block_flops(Block(kind, layer), seq_len) for layer in kept for kind in (Kind.MHA, Kind.MLP)
        )
        layer = min(kept, key=turned.__getitem__)
        factors[layer] = grown[layer] / len(windows)
    changed, size = {}, 1.0
    kept = []
    for layer in range(len(decoder.layers)):
        if layer in factors:
            size *= factors[layer]
            continue
        kept.append(layer)
        for block in (Block(Kind.MHA, layer), Block(Kind.MLP, layer)) if size != 1.0 else ():
            weights = projections[block].weights
            bias = None if weights.bias is None else weights.bias.double() / size
            changed[block] = Weights(weights.weight.double() / size, bias)
    model = with_changed(decoder, kept, projections, changed)
    return Rescaled(model, list(factors), list(factors.values()), work_flops)
