"""How much blocks and layers change the stream that passes them, from one pass over the text.

For each token, x is the stream before a block or layer and y the stream after it, both raw:

- Block influence (ShortGPT, arXiv 2403.03853): BI = 1 - mean cos(x, y). Small: it hardly turns the stream.
- Relative magnitude (a baseline of arXiv 2406.10594; this form is that of EvoPress's code): RM = mean |y - x| / |y|.

After the last layer, too, y is what the layer gives. ShortGPT's code takes `hidden_states[-1]` of transformers there,
which has gone through the final norm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.blocks import Block, Kind
from engine.decoder import Decoder, RowChoice


@dataclass(frozen=True)
class Influence:
    """Means over all tokens, for every MHA block, every MLP block and every whole layer."""

    block_influence: dict[Block, float]
    relative_magnitude: dict[Block, float]


@torch.inference_mode()
def measure_influence(decoder: Decoder, windows: Tensor, on_window: Callable[[], None] = lambda: None) -> Influence:
    """windows: token ids [num_windows, seq_len].

    Of an MHA block, x enters the layer and y = x + MHA(x). Of an MLP block, x is what the MHA block left. Where the two
    run in parallel (GPT-NeoX, Falcon), the MLP does not see what the MHA block adds, and each block is measured by what
    it alone adds to the stream that enters the layer: y = x + MLP(x). Only one window's streams are held.
    """
    turned: dict[Block, float] = defaultdict(float)
    moved: dict[Block, float] = defaultdict(float)
    is_parallel: list[bool] = []
    for window in windows.to(decoder.device):
        stream = decoder.embed(window[None])
        with decoder.selective():
            for layer, place in enumerate(decoder.layer_devices):
                before = stream.to(place)
                if layer == len(is_parallel):
                    is_parallel.append(_is_parallel(decoder, layer, before))
                middle = decoder.run_layer(layer, before, mlp=nobody(before))
                stream = decoder.run_layer(layer, before)
                ends = {
                    Kind.MHA: (before, middle),
                    Kind.MLP: (middle, stream),
                    Kind.LAYER: (before, stream),
                }
                if is_parallel[layer]:
                    ends[Kind.MLP] = before, decoder.run_layer(layer, before, attention=nobody(before))
                for kind, (x, y) in ends.items():
                    x, y = x.double(), y.double()
                    turned[Block(kind, layer)] += (1 - F.cosine_similarity(x, y, dim=-1)).sum().item()
                    moved[Block(kind, layer)] += ((y - x).norm(dim=-1) / y.norm(dim=-1)).sum().item()
        on_window()
    num_tokens = windows.numel()
    return Influence(
        {block: total / num_tokens for block, total in turned.items()},
        {block: total / num_tokens for block, total in moved.items()},
    )


def _is_parallel(decoder: Decoder, layer: int, stream: Tensor) -> bool:
    """Whether the MLP's input is the same bits without the attention."""
    inputs: list[Tensor] = []
    mlp = decoder.layers[layer].get_submodule(decoder.architecture.mlp_modules[0])
    hook = mlp.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    try:
        decoder.run_layer(layer, stream)
        decoder.run_layer(layer, stream, attention=nobody(stream))
    finally:
        hook.remove()
    return torch.equal(*inputs)


def nobody(stream: Tensor) -> RowChoice:
    """The choice by which a block is absent from every sequence of a stream [N, T, H]."""
    none = torch.empty(0, dtype=torch.long, device=stream.device)
    return RowChoice(none, none, none, num_sequences=len(stream))
