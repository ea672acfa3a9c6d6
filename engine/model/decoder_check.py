"""Whether blocks can be removed from a model: tried on a few tokens, with every block and without any."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.architectures import ARCHITECTURES
from blockpruner.engine.model.decoder import Decoder, RowChoice
from blockpruner.engine.model.full_memory import is_out_of_memory

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
"""What a model raises that cannot run as it is called."""


@torch.inference_mode()
def check_removable(decoder: Decoder) -> None:
    """Check that blocks can be removed from a model. Raises UserError with the model's type if not.

    Each layer must pass on its stream bit for bit when both of its blocks are absent, and calling the layers one by
    one must give the logits of the model's own forward. Costs one forward over a few tokens.
    """
    if decoder.model.config.model_type in ARCHITECTURES:
        _check(decoder)
        return
    try:
        _check(decoder)
    except UserError:
        raise
    except FAILURES as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise UserError(
            f"model type {decoder.model.config.model_type!r} is not supported: run as a decoder with layers "
            f"{decoder.architecture.layers}, it fails with {type(error).__name__}: {first_line(error)}"
        ) from error


def _check(decoder: Decoder) -> None:
    windows = torch.arange(6, device=decoder.device)[None] % decoder.model.config.vocab_size
    name = f"model type {decoder.model.config.model_type!r}"
    _check_outputs(decoder, windows, name)
    stream = decoder.embed(windows)
    with decoder.selective():
        for layer, place in enumerate(decoder.layer_devices):
            stream = stream.to(place)
            none = RowChoice.nobody(stream)
            passed = decoder.run_layer(layer, stream, attention=none, mlp=none)
            if not torch.allclose(passed, stream, rtol=0, atol=0, equal_nan=True):
                raise UserError(
                    f"{name} is not supported: layer {layer} changes its stream even when its attention and its "
                    f"MLP are both absent, so removing a block has no clear meaning."
                )
    stream = stream.to(decoder.device)
    for layer in range(len(decoder.layers)):
        stream = decoder.run_layer(layer, stream)
    by_layers, whole = decoder.logits(stream), decoder.model(input_ids=windows, use_cache=False).logits
    # Kernels may round differently when called this way; a wrong order or argument makes a far larger difference.
    if by_layers.shape != whole.shape or not torch.allclose(by_layers, whole, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UserError(
            f"{name} is not supported: its layers, called one by one, do not give the model's logits; they share "
            f"something besides the residual stream."
        )


def _check_outputs(decoder: Decoder, windows: Tensor, name: str) -> None:
    """Raise UserError unless layers pass on one stream [N, T, H] and MLPs return their part of it and nothing else,
    for which an absent MLP has no value."""

    def look_at_layer(module: nn.Module, args: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple | list) else output
        if stream.ndim != 3:
            raise UserError(
                f"{name} is not supported yet: its layers pass on {stream.ndim} dimensions, not one stream of "
                f"[sequences, tokens, hidden size]."
            )

    def look_at_mlp(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            raise UserError(
                f"{name} is not supported yet: its MLPs return {len(output)} values (the stream and, as routed "
                f"ones do, the scores of their router), and the layers use them all."
            )

    with ExitStack() as stack:
        for layer in decoder.layers:
            mlp = layer.get_submodule(decoder.architecture.mlp_modules[-1])
            stack.enter_context(mlp.register_forward_hook(look_at_mlp))
            stack.enter_context(layer.register_forward_hook(look_at_layer))
        try:
            decoder.model(input_ids=windows, use_cache=False)
        except UserError:
            raise
        except FAILURES as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise UserError(
                f"{name} cannot run with the values of its config: its forward fails with {type(error).__name__}: "
                f"{first_line(error)[:200]}"
            ) from error
