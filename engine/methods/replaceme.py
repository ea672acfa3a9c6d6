"""ReplaceMe (arXiv 2505.02819) with least squares: a run of layers is replaced by a linear map, which the MLP before it
takes up.

- The run is that of n neighbouring layers which turns the stream least: the lowest mean cosine distance between the
  stream before and after it.
- M [tokens, H] is the output of the MLP of the layer before the run, s the stream before the run and t the one after
  it. T = argmin |M T - (t - s + M)|^2 = (M^T M)^-1 M^T (t - s + M), and W_down becomes T^T W_down (lstsq.py of the
  published code, whose default has no ridge).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.compensation.projections import Weights, hooked
from blockpruner.engine.methods.fewer_layers import plain_projections, with_changed
from blockpruner.engine.model.decoder import Decoder


@dataclass(frozen=True)
class Replaced:
    model: PreTrainedModel
    layers: list[int]
    """The layers that remain."""
    distance: float
    """Mean cosine distance over the run of layers that was removed."""
    work_flops: int
    """FLOPs of all matmuls over the text."""


@torch.inference_mode()
def replaceme(
    decoder: Decoder, windows: Tensor, *, num_remove: int, on_window: Callable[[], None] = lambda: None
) -> Replaced:
    """Remove a run of layers. windows: token ids [num_windows, seq_len]. on_window: called after each window, twice.

    The first layer stays, since a layer before the run is needed. Raises UserError if that layer's MLP cannot take up
    a linear map.
    """
    num_layers, hidden = len(decoder.layers), decoder.model.config.hidden_size
    turned = dict.fromkeys(range(1, num_layers - num_remove + 1), 0.0)
    for window in windows:
        streams = [decoder.embed(window[None].to(decoder.device))]
        for layer in range(num_layers):
            streams.append(decoder.run_layer(layer, streams[-1]))
        for first in turned:
            s, t = streams[first], streams[first + num_remove]
            turned[first] += (1 - F.cosine_similarity(s.double(), t.double(), dim=-1)).mean().item()
        on_window()
    first = min(turned, key=turned.__getitem__)
    block = Block(Kind.MLP, first - 1)
    projections = plain_projections(decoder, [block])
    projection = projections[block]
    outputs: list[Tensor] = []

    def see(module: nn.Module, inner: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    for window in windows:
        stream = decoder.embed(window[None].to(decoder.device))
        for layer in range(first - 1):
            stream = decoder.run_layer(layer, stream)
        with hooked(projection.module, see):
            s = stream = decoder.run_layer(first - 1, stream)
        for layer in range(first, first + num_remove):
            stream = decoder.run_layer(layer, stream)
        m = projection.scale * outputs.pop().double().view(-1, hidden)
        gap = (stream.double() - s.double()).view(-1, hidden)
        gram += (m.T @ m).cpu()
        cross += (m.T @ (gap + m)).cpu()
        on_window()
    # Least squares also where fewer tokens than dimensions leave it open.
    linear = torch.linalg.lstsq(gram, cross, driver="gelsd").solution.to(projection.weights.weight.device)
    weight, bias = projection.weights.weight.double(), projection.weights.bias
    weight = weight @ linear if projection.is_transposed else linear.T @ weight
    changed = {block: Weights(weight, None if bias is None else linear.T @ bias.double())}
    kept = [layer for layer in range(num_layers) if not first <= layer < first + num_remove]
    seq_len, shape = windows.shape[1], decoder.shape
    run = sum(
        shape.block_flops(Block(kind, layer), seq_len) * (2 if layer < first + num_remove else 1)
        for layer in range(num_layers)
        for kind in (Kind.MHA, Kind.MLP)
    )
    return Replaced(
        with_changed(decoder, kept, projections, changed),
        kept,
        turned[first] / len(windows),
        len(windows) * (run + 4 * seq_len * hidden**2),
    )
