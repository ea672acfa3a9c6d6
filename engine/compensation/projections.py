"""Find the output projection of each block, and what can be fitted in it.

The output projection is the linear layer through which all of a block's output passes (`o_proj`, `down_proj`). It is
found by running a layer, not by its name: a module that the block calls is its output projection if the block adds
nothing to the stream without its output, and twice as much with twice its output.

Shapes: N sequences, T tokens, H hidden size, D input size of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockpruner.engine.blocks import Block, Granularity, Kind
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.selecting import RowChoice

NUM_TOKENS = 6
TOLERANCE, ROUNDINGS = 1e-2, 4
"""Allowed relative difference between outputs that rounding alone may tell apart: the larger of the first, and this
many roundings of the dtype. A wrong module makes a far larger one."""
PROBE = 0.1
"""Size of a stream on which blocks are tried, relative to what they add to it. In bfloat16, a stream that is hundreds
of times as large as what a block adds would round that away."""
NORM_DAMPING = 1e-2


@dataclass(frozen=True)
class Weights:
    """The weight and the bias of an output projection, in the layout of the model."""

    weight: Tensor
    """[H, D], or [D, H] for the `Conv1D` of GPT-2."""
    bias: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Weights:
        return Weights(self.weight.to(device, dtype), None if self.bias is None else self.bias.to(device, dtype))


@dataclass(frozen=True)
class Projection:
    """The output projection of a block."""

    module: nn.Module
    name: str
    """Path of the module in the model."""
    scale: float = 1.0
    """What the block adds to the stream is this number times the output of the module."""
    gain: Tensor | None = None
    """[H], float64. If an RMS norm follows (Gemma 2 and 3, OLMo 2), what the block adds is instead this gain times the
    output divided by its root mean square."""
    width: int = 0
    """D: the number of its inputs, or of those that a narrower MLP has."""

    def __post_init__(self) -> None:
        if not self.width:
            weight: Tensor = self.module.weight  # type: ignore[assignment]
            object.__setattr__(self, "width", weight.shape[0 if self.is_transposed else 1])

    @property
    def is_transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def weights(self) -> Weights:
        return weights_in(self.module)


Projections = Mapping[Block, Projection | str]
"""The output projections of blocks, or the reasons why their outputs cannot be fitted."""


def weights_in(module: nn.Module) -> Weights:
    bias = module.bias
    return Weights(module.weight.detach(), None if bias is None else bias.detach())  # type: ignore[operator]


def rms(values: Tensor) -> Tensor:
    """Return the root mean square [..., 1] over the last dimension."""
    return values.square().mean(-1, keepdim=True).sqrt()


def through_norm(residual: Tensor, weights: Tensor, output: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the output of a projection should change by, if an RMS norm with a gain [H] follows it, and the
    weights of the tokens [N, T] for that.

    residual: what the stream should change by. output: output of the unchanged projection. [N, T, H] both. The root
    mean square is taken to stay as it is, so the fit is one step of Gauss-Newton. Channels in which the gain is small
    are damped.
    """
    size, gain = rms(output), gain.to(residual.dtype)
    inverse = gain / (gain.square() + NORM_DAMPING * gain.square().mean())
    return size * residual * inverse, weights / size.squeeze(-1).square()


def applied(weights: Weights, inner: Tensor, *, is_transposed: bool) -> Tensor:
    """Return the output [..., H] of a projection with other weights for its input [..., D]."""
    weight = weights.weight.T if is_transposed else weights.weight
    return nn.functional.linear(inner, weight, weights.bias)


@contextmanager
def hooked(module: nn.Module, hook: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_block(decoder: Decoder, block: Block, stream: Tensor, lacks: int = 0) -> Tensor:
    """Return the stream [N, T, H] after one block, with the other block of its layer absent. Works only inside
    `decoder.selective()`. lacks: number of groups that the block lacks."""
    none, narrower = RowChoice.nobody(stream), RowChoice.lacking(stream, lacks) if lacks else None
    if block.kind is Kind.MHA:
        return decoder.run_layer(block.layer, stream, attention=narrower, mlp=none)
    return decoder.run_layer(block.layer, stream, attention=none, mlp=narrower)


def tolerance(dtype: torch.dtype) -> float:
    return max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)


def probe(run: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    """Return a stream for trying what a block or a layer adds to it: the given one, made small if it is large beside
    that. run: leads a stream through the block or the layer."""
    for _ in range(3):  # rounding may have hidden at first how little is added
        size = (run(stream) - stream).abs().max()
        stream = stream * (PROBE * size / stream.abs().max()).clamp(max=1)
    return stream


@torch.inference_mode()
def find_projections(decoder: Decoder) -> Projections:
    """Return the output projection of every block, or the reason why its output cannot be fitted."""
    if decoder.architecture.has_rest:
        blocks = decoder.shape.candidates(Granularity.MIX)
        return dict.fromkeys(blocks, "its layer does something to the stream beside its blocks")
    ids = torch.arange(NUM_TOKENS, device=decoder.device)[None] % decoder.model.config.vocab_size
    stream = decoder.embed(ids)
    found: dict[Block, Projection | str] = {}
    with decoder.selective():
        for layer, device in enumerate(decoder.layer_devices):
            stream = stream.to(device)
            after = decoder.run_layer(layer, stream)
            for kind in (Kind.MHA, Kind.MLP):
                if (block := Block(kind, layer)) not in decoder.shape.missing:
                    found[block] = _projection(decoder, block, stream)
            stream = after
    return found


def _projection(decoder: Decoder, block: Block, stream: Tensor) -> Projection | str:
    """The last linear layer that a block calls is the only one that can be its output projection."""
    architecture = decoder.architecture
    layer = decoder.layers[block.layer]
    names = architecture.modules_of(layer, block.kind)
    last: list[tuple[nn.Module, str]] = []
    handles = []
    for name in names:
        owner = layer.get_submodule(name)
        for inner, module in owner.named_modules(prefix=f"{architecture.layers}.{block.layer}.{name}"):
            if isinstance(module, nn.Linear | Conv1D):
                handles.append(module.register_forward_hook(lambda m, a, o, path=inner: last.append((m, path))))
    run_block(decoder, block, stream)
    for handle in handles:
        handle.remove()
    if not last:
        return "it has no linear layer"
    module, path = last[-1]
    stream = probe(partial(run_block, decoder, block), stream)
    added = run_block(decoder, block, stream) - stream
    outputs: list[Tensor] = []
    with hooked(module, lambda m, a, output: outputs.append(output)):
        run_block(decoder, block, stream)
    if len(outputs) != 1 or outputs[0].shape[-1] != stream.shape[-1] or outputs[0].numel() != stream.numel():
        return "its output does not come from one linear layer"
    output = outputs[0].view_as(stream)

    def added_with(factor: float) -> Tensor:
        with hooked(module, lambda m, a, output: output * factor):
            return run_block(decoder, block, stream) - stream

    size, allowed = added.abs().max(), tolerance(stream.dtype)
    if not added_with(0.0).abs().max() <= allowed * size:
        return "its output does not come from one linear layer"
    if not (added_with(2.0) - 2 * added).abs().max() <= allowed * size:
        unit = output.double() / rms(output.double())
        gain = (added * unit).sum((0, 1)) / unit.square().sum((0, 1))
        if not (added - gain * unit).abs().max() <= allowed * size:
            return "its output is changed after its output projection"
        return Projection(module, path, gain=gain)
    scale = float((added.double() * output.double()).sum() / output.double().square().sum())
    if not (added - scale * output).abs().max() <= allowed * size:
        return "its output is changed after its output projection"
    return Projection(module, path, scale=1.0 if abs(scale - 1) < allowed else scale)
