"""What a model's layers and their blocks return: a tensor, or a tuple that begins with one. Learnt by running once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Kind
from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.full_memory import is_out_of_memory
from blockpruner.engine.model.rows import Architecture


@dataclass
class Outputs:
    """Lengths of the tuples that a layer and the modules of its blocks return; None for a tensor alone."""

    layer: int | None = None
    modules: dict[str, int | None] = field(default_factory=dict)


@torch.inference_mode()
def learn_outputs(model: PreTrainedModel, architecture: Architecture, layers: Sequence[nn.Module]) -> list[Outputs]:
    """Run the model once over a few tokens, and return what each layer and its blocks return.

    Raises UserError if the model cannot run, if its layers pass on anything but one stream [N, T, H], or if a block
    returns weights for its layer to add, for which an absent block has no value.
    """
    found = [Outputs() for _ in layers]
    name = f"model type {model.config.model_type!r}"

    def look_at_layer(index: int, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple | list) else output
        if stream.ndim != 3:
            raise UserError(
                f"{name} is not supported yet: its layers pass on {stream.ndim} dimensions, not one stream of "
                f"[sequences, tokens, hidden size]."
            )
        found[index].layer = _length(output)

    def look_at_module(index: int, module: str, output: Any) -> None:
        if isinstance(output, tuple) and any(isinstance(other, nn.Parameter) for other in output[1:]):
            raise UserError(
                f"{name} is not supported yet: {module!r} of its layer {index} returns weights that the layer adds, "
                f"whether the block is there or not."
            )
        found[index].modules[module] = _length(output)

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_seen(layer, lambda output, index=index: look_at_layer(index, output)))
            for module in (*architecture.modules_of(layer, Kind.MHA), *architecture.modules_of(layer, Kind.MLP)):
                look = lambda output, index=index, module=module: look_at_module(index, module, output)  # noqa: E731
                stack.enter_context(_seen(layer.get_submodule(module), look))
        windows = torch.arange(3, device=model.device)[None] % model.config.vocab_size
        with failures_told(f"{name} cannot run with the values of its config: its forward fails with"):
            model(input_ids=windows, use_cache=False)
    return found


def _length(output: Any) -> int | None:
    return len(output) if isinstance(output, tuple | list) else None


@contextmanager
def _seen(module: nn.Module, look: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, output: look(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def failures_told(what: str) -> Iterator[None]:
    """Turn whatever a model's own code raises into one line: `what`, the error's type and its first line. A full memory
    says nothing about a model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise UserError(f"{what} {type(error).__name__}: {first_line(error)[:200]}") from error
