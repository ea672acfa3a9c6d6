"""Where the blocks of a Hugging Face decoder are, and how to run its own code layer by layer, row by row.

Nothing of a model's forward is written again here. The model's own forward runs once with its layers recording their
arguments; then the layers are called one at a time. Attention and MLP modules compute only the rows that keep them
and give zeros to the others: in a residual architecture a zero output is an absent block.

Shapes: N sequences in a call (rows x windows), T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import UserError
from engine.shape import BlockShape, ModelShape


@dataclass(frozen=True)
class Anatomy:
    """The names that an architecture gives to its layers, blocks and norms."""

    layers: str
    attention: str
    mlp: str
    attention_norms: tuple[str, ...]
    """Norms of the layer that go with its attention."""
    mlp_norms: tuple[str, ...]


_LLAMA = Anatomy("model.layers", "self_attn", "mlp", ("input_layernorm",), ("post_attention_layernorm",))

ANATOMIES = {"llama": _LLAMA}
"""By `model_type`. An architecture that is not here is refused by name."""


@dataclass(frozen=True)
class RowChoice:
    """Which of the N sequences of a call a block is computed for, and who receives the result.

    `computed`: indices of the sequences to compute. `receivers`, `sources`: receivers[i] gets the output of
    computed[sources[i]]. All others get zeros.
    """

    computed: Tensor
    receivers: Tensor
    sources: Tensor


class _SelectiveForward:
    """Stands in for the forward of an attention or MLP module while a sweep runs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.choice: RowChoice | None = None
        """None: every row is computed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.choice is None:
            return self.forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        output = torch.zeros_like(hidden)
        if len(self.choice.computed) == 0:
            return (output, None) if self.returns_tuple else output
        chosen = hidden.index_select(0, self.choice.computed)
        if args:
            result = self.forward(chosen, *args[1:], **kwargs)
        else:
            result = self.forward(**{**kwargs, "hidden_states": chosen})
        stream, *rest = result if isinstance(result, tuple) else (result,)
        output.index_copy_(0, self.choice.receivers, stream.index_select(0, self.choice.sources))
        return (output, *rest) if isinstance(result, tuple) else output

    returns_tuple = False


class _SelectiveAttention(_SelectiveForward):
    returns_tuple = True


class Decoder:
    """A causal language model, seen as a list of layers of an attention and an MLP block each."""

    def __init__(self, model: PreTrainedModel) -> None:
        model_type = model.config.model_type
        if model_type not in ANATOMIES:
            raise UserError(
                f"expected a model of type {', '.join(sorted(ANATOMIES))}, got {model_type!r}: "
                f"where the blocks of this architecture are is not known yet."
            )
        self.model = model.eval()
        self.anatomy = ANATOMIES[model_type]
        self.layers: list[nn.Module] = list(model.get_submodule(self.anatomy.layers))
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        """For windows of T tokens, what the model passes to each layer beside the stream."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].get_submodule(self.anatomy.attention)

    def mlp(self, layer: int) -> nn.Module:
        return self.layers[layer].get_submodule(self.anatomy.mlp)

    @cached_property
    def shape(self) -> ModelShape:
        config = self.model.config

        def block_shape(layer: nn.Module, block: str, norms: Sequence[str]) -> BlockShape:
            weights = [parameter for name in (block, *norms) for parameter in layer.get_submodule(name).parameters()]
            return BlockShape(
                num_parameters=sum(weight.numel() for weight in weights),
                num_matmul_weights=sum(weight.numel() for weight in weights if weight.ndim == 2),
            )

        names = self.anatomy
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ModelShape(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            attention_width=config.num_attention_heads * head_dim,
            num_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            mha=tuple(block_shape(layer, names.attention, names.attention_norms) for layer in self.layers),
            mlp=tuple(block_shape(layer, names.mlp, names.mlp_norms) for layer in self.layers),
        )

    def embed(self, windows: Tensor) -> Tensor:
        """Token ids [N, T] to the stream that enters the first layer, [N, T, H]."""
        calls = self._record(windows)
        num_tokens = windows.shape[1]
        if num_tokens not in self._arguments:
            # One sequence: whatever depends on the batch size then broadcasts over any number of rows.
            one = calls if windows.shape[0] == 1 else self._record(windows[:1])
            self._arguments[num_tokens] = [(args[1:], kwargs) for args, kwargs in one]
        return calls[0][0][0]

    def run_layer(
        self, layer: int, stream: Tensor, *, attention: RowChoice | None = None, mlp: RowChoice | None = None
    ) -> Tensor:
        """The layer's own forward over [N, T, H]; a RowChoice restricts a block to some sequences (inside
        `selective()` only)."""
        args, kwargs = self._arguments[stream.shape[1]][layer]
        if attention is not None or mlp is not None:
            self._selectors[layer][0].choice = attention
            self._selectors[layer][1].choice = mlp
        try:
            output = self.layers[layer](stream, *args, **kwargs)
        finally:
            if attention is not None or mlp is not None:
                self._selectors[layer][0].choice = self._selectors[layer][1].choice = None
        return output[0] if isinstance(output, tuple) else output

    def logits(self, stream: Tensor) -> Tensor:
        """The stream that leaves the last layer, [N, T, H], to logits [N, T, V].

        Runs the model's own forward with every layer passing the given stream on, so that the final norm, the output
        projection, scales and soft caps come along.
        """
        ids = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
        with self._layer_forwards(lambda layer: lambda hidden, *args, **kwargs: stream):
            return self.model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def selective(self) -> Iterator[None]:
        """Within this context `run_layer` takes row choices. Leaving it restores the modules whatever happened."""
        with ExitStack() as stack:
            self._selectors: list[tuple[_SelectiveForward, _SelectiveForward]] = []
            for layer in range(len(self.layers)):
                attention = _SelectiveAttention(self.attention(layer).forward)
                mlp = _SelectiveForward(self.mlp(layer).forward)
                stack.enter_context(_forward_replaced(self.attention(layer), attention))
                stack.enter_context(_forward_replaced(self.mlp(layer), mlp))
                self._selectors.append((attention, mlp))
            yield

    def _record(self, windows: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each layer is called with when the model runs on `windows` and no layer does anything."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def recorder(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(((hidden, *args), kwargs))
            return hidden

        with self._layer_forwards(lambda layer: recorder):
            self.model.base_model(input_ids=windows, use_cache=False)
        return calls

    @contextmanager
    def _layer_forwards(self, forward_of: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(_forward_replaced(layer, forward_of(index)))
            yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another forward. The module itself stays, so whoever reads its attributes still can."""
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous
