"""Measure how much blocks and layers change the residual stream, in one pass over the text.

For each token, x is the stream before a block or layer and y is the stream after it, both without norm:

- Block influence (ShortGPT, arXiv 2403.03853): BI = 1 - mean cos(x, y). A small value means that the direction of the
  stream hardly changes.
- Relative magnitude (a baseline of arXiv 2406.10594): RM = mean |y - x| / |y|, with the norm over the hidden size, as
  in EvoPress's code. The paper writes |f(x) / (x + f(x))| with f(x) = y - x and does not say whether the ratio is
  elementwise; its code is not published.

For the last layer, y is also the raw output of the layer. ShortGPT's code uses `hidden_states[-1]` of transformers
there, which is taken after the final norm.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.selecting import RowChoice
from blockpruner.engine.work.units import window_groups, windows_per_row

DENSE = Mask()


@dataclass(frozen=True)
class Influence:
    """Means over all tokens for every measured MHA block, MLP block and layer."""

    block_influence: dict[Block, float]
    relative_magnitude: dict[Block, float]
    work_flops: int
    """Matmul FLOPs of all passes, as counted by `ModelShape`."""


@torch.inference_mode()
def measure_influence(
    decoder: Decoder,
    windows: Tensor,
    on_window: Callable[[], None] = lambda: None,
    *,
    mask: Mask = DENSE,
    layers_only: bool = False,
) -> Influence:
    """Measure the influence of all blocks that the mask keeps.

    windows: token ids [num_windows, seq_len]. mask: blocks that are already absent; they are not measured.
    layers_only: measure only whole layers, which takes half the time.

    For an MHA block, x is the input of the layer and y = x + MHA(x). For an MLP block, x is the stream after the MHA
    block. Where the two run in parallel (GPT-NeoX, Falcon), the MLP does not see the output of the MHA block, and each
    block is measured by what it adds to the input of the layer: y = x + MLP(x). Only the streams of a few windows are
    held in memory.
    """
    turned: dict[Block, float] = defaultdict(float)
    moved: dict[Block, float] = defaultdict(float)
    is_parallel: dict[int, bool] = {}
    num_runs: Counter[Block] = Counter()
    """Number of windows that each block ran on."""

    def run(layer: int, x: Tensor, *absent: Kind) -> Tensor:
        num_runs.update({Block(kind, layer): len(x) for kind in (Kind.MHA, Kind.MLP) if kind not in absent})
        attention, mlp = (RowChoice.nobody(x) if kind in absent else None for kind in (Kind.MHA, Kind.MLP))
        given = beside.of(layer, [0])
        output = decoder.run_layer(layer, x, attention=attention, mlp=mlp, given=given)
        if Kind.MHA not in absent:
            beside.note(given, [0])
        return output

    def note(kind: Kind, layer: int, x: Tensor, y: Tensor) -> None:
        x, y = x.double(), y.double()
        turned[Block(kind, layer)] += (1 - F.cosine_similarity(x, y, dim=-1)).sum().item()
        moved[Block(kind, layer)] += ((y - x).norm(dim=-1) / y.norm(dim=-1)).sum().item()

    kept = Mask(mask.absent | decoder.shape.missing)
    for group in window_groups(len(windows), windows_per_row(windows.shape[1])):
        stream, beside = decoder.start(windows[group.start : group.stop].to(decoder.device))
        with decoder.selective():
            for layer, place in enumerate(decoder.layer_devices):
                x = stream.to(place)
                absent = [kind for kind in (Kind.MHA, Kind.MLP) if not kept.keeps(kind, layer)]
                if len(absent) == 2:
                    if decoder.architecture.has_rest:
                        stream = run(layer, x, *absent)
                    continue
                stream = run(layer, x, *absent)
                note(Kind.LAYER, layer, x, stream)
                if layers_only:
                    continue
                if absent:
                    note(Kind.MHA if absent == [Kind.MLP] else Kind.MLP, layer, x, stream)
                    continue
                middle = run(layer, x, Kind.MLP)
                if layer not in is_parallel:
                    is_parallel[layer] = _is_parallel(decoder, layer, x, run)
                note(Kind.MHA, layer, x, middle)
                if is_parallel[layer]:
                    note(Kind.MLP, layer, x, run(layer, x, Kind.MHA))
                else:
                    note(Kind.MLP, layer, middle, stream)
        for _ in group:
            on_window()
    num_tokens, seq_len = windows.numel(), windows.shape[1]
    return Influence(
        {block: total / num_tokens for block, total in turned.items()},
        {block: total / num_tokens for block, total in moved.items()},
        sum(times * decoder.shape.block_flops(block, seq_len) for block, times in num_runs.items()),
    )


def _is_parallel(decoder: Decoder, layer: int, stream: Tensor, run: Callable[..., Tensor]) -> bool:
    """Whether the MLP's input has the same bits with and without the attention."""
    inputs: list[Tensor] = []
    module = decoder.layers[layer]
    mlp = module.get_submodule(decoder.architecture.modules_of(module, Kind.MLP)[0])
    hook = mlp.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    try:
        run(layer, stream)
        run(layer, stream, Kind.MHA)
    finally:
        hook.remove()
    return torch.equal(*inputs)
