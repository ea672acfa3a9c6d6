"""Whether blocks can be removed from a model: tried on a few tokens against the model's own forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.given import Beside
from blockpruner.engine.model.outputs import failures_told
from blockpruner.engine.model.selecting import RowChoice

NUM_TOKENS = 6
KINDS = (Kind.MHA, Kind.MLP)
NOUNS = {Kind.MHA: "mixer", Kind.MLP: "MLP"}
ROUNDINGS = 32
"""Errors of this many roundings are allowed, as a share of what a block changes. Kernels may round differently when
they get other shapes; a wrong order, argument or module makes a far larger difference."""
LEAST_SHARE = 1e-3


@torch.inference_mode()
def check_removable(decoder: Decoder) -> None:
    """Check that blocks can be removed from a model. Raises UserError with the model's type if not.

    - What the model passes to its layers beside the stream must not depend on the tokens, except what the family's row
      says (`by_token`).
    - Each layer must pass on its stream bit for bit when both of its blocks are absent, unless the family's row says
      that it does something beside them.
    - Two windows in one call, with and without each block of a layer, must give what the layer itself gives for the
      model's own arguments when hooks take the block's output away.
    - So must the whole model, dense and with two masks that take half of the blocks each. That fails if layers share
      something besides the stream.

    Costs five forwards over a few tokens, and for each layer as much again.
    """
    name = f"model type {decoder.model.config.model_type!r}"
    with failures_told(
        f"{name} is not supported: run as a decoder with layers {decoder.architecture.layers}, it fails with"
    ):
        _check(decoder, f"{name} is not supported: ")


def _check(decoder: Decoder, refusal: str) -> None:
    vocab_size = decoder.model.config.vocab_size
    windows = torch.arange(2 * NUM_TOKENS, device=decoder.device).view(2, -1) % vocab_size
    _check_arguments(decoder, windows, refusal)
    beside = decoder.start(windows)[1]
    sizes = _sizes_of_mappings(decoder)
    with decoder.selective():
        dense = _check_layers(decoder, windows, beside, refusal)
        _check_whole(decoder, windows, dense, refusal)
    if _sizes_of_mappings(decoder) != sizes:
        raise UserError(
            f"{refusal}its layers leave something for each other (such as keys and values that later layers read), so "
            f"removing a block has no clear meaning."
        )


def _check_arguments(decoder: Decoder, windows: Tensor, refusal: str) -> None:
    one, other = (decoder.record(window[None]) for window in windows)
    for layer, (first, second) in enumerate(zip(one, other, strict=True)):
        for place, value in _named(first):
            is_carried = place in [f"its argument {number}" for number in decoder.architecture.by_token]
            if not is_carried and not _same(value, dict(_named(second)).get(place)):
                raise UserError(
                    f"{refusal}layer {layer} is given {place}, which depends on the tokens, beside the stream."
                )


def _named(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    args, kwargs = call
    yield from ((f"its argument {index}", value) for index, value in enumerate(args) if index > 0)
    yield from ((repr(key), value) for key, value in kwargs.items())


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same tensors."""
    values, others = (tree_flatten(argument)[0] for argument in (one, other))
    return len(values) == len(others) and all(
        isinstance(second, Tensor)
        and first.shape == second.shape
        and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
        for first, second in zip(values, others, strict=True)
        if isinstance(first, Tensor)
    )


def _sizes_of_mappings(decoder: Decoder) -> list[int]:
    values = (value for args, kwargs in decoder.arguments(NUM_TOKENS) for value in (*args, *kwargs.values()))
    return [len(value) for value in values if isinstance(value, MutableMapping)]


def _check_layers(decoder: Decoder, windows: Tensor, beside: Beside, refusal: str) -> Tensor:
    """Check each layer while the model's own forward runs, with the arguments that the model itself passes. Returns the
    model's logits."""
    is_inside, sharing = False, decoder.architecture.sharing

    def check(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal is_inside
        if not is_inside:
            is_inside = True
            left = dict(kwargs[sharing.argument]) if sharing else {}
            _check_layer(decoder, layer, args, kwargs, beside.having(left), _stream(output), refusal)
            is_inside = False

    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            hook = lambda _, args, kwargs, output, index=index: check(index, args, kwargs, output)  # noqa: E731
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        return decoder.model(input_ids=windows, use_cache=False).logits


def _check_layer(
    decoder: Decoder,
    layer: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    beside: Beside,
    dense: Tensor,
    refusal: str,
) -> None:
    stream = args[0].to(decoder.layer_devices[layer])
    none = RowChoice.nobody(stream)

    def alone(attention: RowChoice | None = None, mlp: RowChoice | None = None) -> Tensor:
        return decoder.run_layer(layer, stream, attention=attention, mlp=mlp, given=beside.of(layer, [0]))

    rest = alone(none, none)
    if not decoder.architecture.has_rest and not torch.allclose(rest, stream, rtol=0, atol=0, equal_nan=True):
        raise UserError(
            f"{refusal}layer {layer} changes its stream even when its attention and its MLP are both absent, so "
            f"removing a block has no clear meaning."
        )
    without: dict[Kind, Tensor] = {}
    for kind in KINDS:
        with bypassed(decoder, [Block(kind, layer)]):
            without[kind] = _stream(decoder.layers[layer](*args, **kwargs))
    with bypassed(decoder, [Block(kind, layer) for kind in KINDS]):
        without_both = _stream(decoder.layers[layer](*args, **kwargs))
    # Rows: the dense one, one without the mixer, one without the MLP. The first and the last share the mixer's output.
    rows = [torch.arange(2, device=stream.device) + 2 * row for row in range(3)]
    two, four = torch.arange(2, device=stream.device), torch.arange(4, device=stream.device)
    company = decoder.run_layer(
        layer,
        torch.cat([stream] * 3),
        attention=RowChoice(two, torch.cat([rows[0], rows[2]]), torch.cat([two, two]), 6),
        mlp=RowChoice(four, four, four, 6),
        given=beside.of(layer, [0] * 3),
    )
    found = {
        "without both blocks": [(rest, without_both)],
        "with both blocks": [(company[:2], dense)],
        "without its mixer": [
            (company[2:4], without[Kind.MHA]),
            (alone(attention=none), without[Kind.MHA]),
        ],
        "without its MLP": [
            (company[4:], without[Kind.MLP]),
            (alone(mlp=none), without[Kind.MLP]),
        ],
    }
    changes = [(one - dense).double().norm() for one in without.values()]
    for what, pairs in found.items():
        for one, expected in pairs:
            if not is_close(one.to(expected.device), expected, torch.stack(changes).max()):
                raise UserError(
                    f"{refusal}layer {layer} {what}, among other rows or alone, does not give what it gives when hooks "
                    f"take the block's output away."
                )


def _check_whole(decoder: Decoder, windows: Tensor, dense: Tensor, refusal: str) -> None:
    layers, needed = range(len(decoder.layers)), decoder.shape.needed
    halves = [[Block(KINDS[(layer + first) % 2], layer) for layer in layers] for first in (0, 1)]
    halves = [[block for block in half if block not in needed] for half in halves]
    masks = [Mask(), *(Mask.of(half) for half in halves)]
    stream, beside = decoder.start(windows)
    streams = [stream] * len(masks)
    for layer, place in enumerate(decoder.layer_devices):
        for number, mask in enumerate(masks):
            stream = streams[number].to(place)
            absent = {kind: None if mask.keeps(kind, layer) else RowChoice.nobody(stream) for kind in KINDS}
            given = beside.of(layer, [number])
            streams[number] = decoder.run_layer(
                layer, stream, attention=absent[Kind.MHA], mlp=absent[Kind.MLP], given=given
            )
            beside.note(given, [number])
    expected = [dense]
    for half in halves:
        with bypassed(decoder, half):
            expected.append(decoder.model(input_ids=windows, use_cache=False).logits)
    change = torch.stack([(one - dense).double().norm() for one in expected]).max()
    for stream, logits in zip(streams, expected, strict=True):
        found = decoder.logits(stream.to(decoder.device))
        if found.shape != logits.shape or not is_close(found, logits, change):
            raise UserError(
                f"{refusal}its layers, called one by one, do not give the model's logits; they share something besides "
                f"the residual stream."
            )


@contextmanager
def bypassed(decoder: Decoder, blocks: Iterable[Block]) -> Iterator[None]:
    """Take the outputs of blocks away by hooks, while the model's own code runs."""
    names = decoder.architecture

    def take_away(module: nn.Module, args: Any, kwargs: Any, output: Any, *, adds_residual: bool) -> Any:
        nothing = args[1] if adds_residual else torch.zeros_like(_stream(output))
        return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

    with ExitStack() as stack:
        for block in blocks:
            layer = decoder.layers[block.layer]
            modules = names.modules_of(layer, block.kind)
            is_inline = block.kind is Kind.MLP and names.inline_mlp
            for name in modules[-1:] if is_inline else modules:
                hook = lambda *seen, to=block.kind in names.residual_in: take_away(*seen, adds_residual=to)  # noqa: E731
                handle = layer.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def is_close(found: Tensor, expected: Tensor, change: Tensor) -> bool:
    """Whether two tensors differ by rounding alone. change: norm of what blocks change there."""
    rounding = torch.finfo(expected.dtype).eps
    error = torch.nan_to_num((found - expected).double()).norm()
    share = max(LEAST_SHARE, ROUNDINGS * rounding)
    allowed = share * torch.nan_to_num(change) + 4 * rounding * torch.nan_to_num(expected.double()).norm()
    too_much = (error - allowed.to(error.device)).clamp(min=0)
    return torch.allclose(too_much, torch.zeros_like(too_much), rtol=0, atol=0)
