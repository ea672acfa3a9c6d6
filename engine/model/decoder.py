"""Run a Hugging Face decoder's own code layer by layer and row by row.

No part of a model's forward is reimplemented. The model's own forward runs once while its layers record their
arguments; after that the layers are called one at a time. Attention and MLP modules compute only the rows that keep
them and return zeros for the others. In a residual architecture, a zero output is equivalent to an absent block.

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
from transformers import PreTrainedModel, masking_utils

from blockpruner.engine.model.architectures import architecture_of, matmul_weights
from blockpruner.engine.work.shape import BlockShape, ModelShape


@dataclass(frozen=True)
class RowChoice:
    """For which of the N sequences of a call a block is computed, and which sequences receive the result.

    `computed`: indices of the sequences to compute. `receivers`, `sources`: receivers[i] gets the output of
    computed[sources[i]]. All other sequences get the output of an absent block.
    """

    computed: Tensor
    receivers: Tensor
    sources: Tensor
    num_sequences: int

    @classmethod
    def nobody(cls, stream: Tensor) -> RowChoice:
        """Return the choice that makes a block absent for every sequence of a stream [N, T, H]."""
        none = torch.empty(0, dtype=torch.long, device=stream.device)
        return cls(none, none, none, num_sequences=len(stream))


class _Selector:
    """Replaces the forward of an attention or MLP module during a sweep."""

    def __init__(
        self,
        forward: Callable[..., Any],
        *,
        returns_tuple: bool,
        adds_residual: bool,
        batched_arguments: tuple[str, ...] = (),
    ) -> None:
        self.forward = forward
        self.batched_arguments = batched_arguments
        self.returns_tuple = returns_tuple
        self.adds_residual = adds_residual
        self.choice: RowChoice | None = None
        """None means that every row is computed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        choice = self.choice
        if choice is None:
            return self.forward(*args, **kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        rest = args[1:]
        output = rest[0].clone() if self.adds_residual else torch.zeros_like(hidden)
        if len(choice.computed) == 0:
            return (output, None) if self.returns_tuple else output
        if self.adds_residual:
            rest = (rest[0].index_select(0, choice.computed), *rest[1:])
        for name in self.batched_arguments:  # equal for every sequence, so take the first ones
            kwargs[name] = kwargs[name][: len(kwargs[name]) // choice.num_sequences * len(choice.computed)]
        result = self.forward(hidden.index_select(0, choice.computed), *rest, **kwargs)
        stream, *others = result if isinstance(result, tuple) else (result,)
        output.index_copy_(0, choice.receivers, stream.index_select(0, choice.sources))
        return (output, *others) if isinstance(result, tuple) else output


class _InlineMlp:
    """An MLP that the layer's own code computes: its first module drops rows, and its last module restores them.

    The layer may flatten sequences and tokens into one dimension.
    """

    def __init__(self, first: Callable[..., Tensor], last: Callable[..., Tensor]) -> None:
        self.choice: RowChoice | None = None
        self._first_forward = first
        self._last_forward = last

    def first(self, hidden: Tensor) -> Tensor:
        if self.choice is None:
            return self._first_forward(hidden)
        self._shape = hidden.shape
        sequences = hidden.view(self.choice.num_sequences, -1, hidden.shape[-1])
        return self._first_forward(sequences.index_select(0, self.choice.computed))

    def last(self, hidden: Tensor) -> Tensor:
        if self.choice is None:
            return self._last_forward(hidden)
        output = hidden.new_zeros(self._shape)
        if len(self.choice.computed):
            result = self._last_forward(hidden).index_select(0, self.choice.sources)
            output.view(self.choice.num_sequences, -1, self._shape[-1]).index_copy_(0, self.choice.receivers, result)
        return output


class Decoder:
    """A causal language model as a list of layers, each with an attention and an MLP block."""

    def __init__(self, model: PreTrainedModel, layer_devices: Sequence[torch.device] | None = None) -> None:
        """layer_devices: device of each layer; None means the model's device for all."""
        self.architecture = architecture_of(model)
        self.model = model.eval()
        self.layers: list[nn.Module] = list(model.get_submodule(self.architecture.layers))
        self.layer_devices = layer_devices or [self.device] * len(self.layers)
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        """For windows of T tokens, the arguments that the model passes to each layer in addition to the stream."""
        self._layers_return_tuples: bool | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def free_bytes(self) -> int | None:
        """Memory that the weights leave free on the fullest device, in bytes; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return min(torch.cuda.mem_get_info(device)[0] for device in {self.device, *self.layer_devices})

    @cached_property
    def shape(self) -> ModelShape:
        config, names = self.model.config, self.architecture

        def block_shape(layer: nn.Module, blocks: Sequence[str], norms: Sequence[str]) -> BlockShape:
            modules = nn.ModuleList(layer.get_submodule(name) for name in blocks)
            dead = [weight for name in norms for weight in layer.get_submodule(name).parameters()]
            return BlockShape(
                num_parameters=sum(weight.numel() for weight in [*modules.parameters(), *dead]),
                num_matmul_weights=matmul_weights(modules, config),
            )

        mha = tuple(block_shape(layer, (names.attention,), names.attention_norms) for layer in self.layers)
        mlp = tuple(block_shape(layer, names.mlp_modules, names.mlp_norms) for layer in self.layers)
        totals = [sum(weight.numel() for weight in layer.parameters()) for layer in self.layers]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ModelShape(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            attention_width=config.num_attention_heads * head_dim,
            num_score_heads=config.num_attention_heads if config._attn_implementation == "eager" else 0,
            routes_tokens=bool(getattr(config, "num_experts_per_tok", 0)),
            num_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            mha=mha,
            mlp=mlp,
            shared=tuple(
                total - attention.num_parameters - feed_forward.num_parameters
                for total, attention, feed_forward in zip(totals, mha, mlp, strict=True)
            ),
        )

    def embed(self, windows: Tensor) -> Tensor:
        """Return the stream [N, T, H] that enters the first layer for token ids [N, T]."""
        calls = self._record(windows)
        num_tokens = windows.shape[1]
        if num_tokens not in self._arguments:
            # Record with one sequence, so that arguments that depend on the batch size broadcast to any number of rows.
            one = calls if windows.shape[0] == 1 else self._record(windows[:1])
            self._arguments[num_tokens] = [(args[1:], kwargs) for args, kwargs in one]
        return calls[0][0][0]

    def run_layer(
        self, layer: int, stream: Tensor, *, attention: RowChoice | None = None, mlp: RowChoice | None = None
    ) -> Tensor:
        """Run the layer's own forward over a stream [N, T, H]. A RowChoice restricts a block to some sequences, and
        works only inside `selective()`."""
        args, kwargs = self._arguments[stream.shape[1]][layer]
        for name in self.architecture.batched_arguments:
            kwargs = {**kwargs, name: torch.cat([kwargs[name]] * len(stream))}
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
        """Return the logits [N, T, V] for the stream [N, T, H] after the last layer.

        Runs the model's own forward with every layer passing on the given stream, so that the final norm, the output
        projection, scales and soft caps are applied.
        """
        ids = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)

        def pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._as_layers_return(stream)

        with self._layer_forwards(pass_on):
            return self.model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def selective(self) -> Iterator[None]:
        """Allow row choices in `run_layer` within this context. Leaving it always restores the modules."""
        names = self.architecture
        with ExitStack() as stack:
            self._selectors: list[tuple[_Selector, _Selector | _InlineMlp]] = []
            for layer in self.layers:
                attention = layer.get_submodule(names.attention)
                chooser = _Selector(
                    attention.forward,
                    returns_tuple=True,
                    adds_residual="attention" in names.residual_in,
                    batched_arguments=names.batched_arguments,
                )
                stack.enter_context(forward_replaced(attention, chooser))
                modules = [layer.get_submodule(name) for name in names.mlp_modules]
                mlp: _Selector | _InlineMlp
                if len(modules) == 1:
                    adds_residual = "mlp" in names.residual_in
                    mlp = _Selector(modules[0].forward, returns_tuple=False, adds_residual=adds_residual)
                    stack.enter_context(forward_replaced(modules[0], mlp))
                else:
                    mlp = _InlineMlp(modules[0].forward, modules[1].forward)
                    stack.enter_context(forward_replaced(modules[0], mlp.first))
                    stack.enter_context(forward_replaced(modules[1], mlp.last))
                self._selectors.append((chooser, mlp))
            yield

    def _record(self, windows: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments of each layer when the model runs on `windows` with layers that pass on the stream."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first_layer = self.layers[0].forward

        def recorder(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(((hidden, *args), kwargs))
            if self._layers_return_tuples is None:  # not documented anywhere, so run one layer and look
                output = first_layer(hidden, *args, **kwargs)
                self._layers_return_tuples = isinstance(output, tuple)
            return self._as_layers_return(hidden)

        with self._layer_forwards(recorder):
            self.model.base_model(input_ids=windows, use_cache=False)
        return calls

    @contextmanager
    def _layer_forwards(self, forward: Callable[..., Any]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_nothing_packed())
            for layer in self.layers:
                stack.enter_context(forward_replaced(layer, forward))
            yield

    def _as_layers_return(self, stream: Tensor) -> Any:
        """Return the stream as this model's layers do: on its own, or as the first element of a tuple."""
        return (stream, None) if self._layers_return_tuples else stream


@contextmanager
def _nothing_packed() -> Iterator[None]:
    """Disable transformers' check for packed sequences. In every forward it looks for positions that restart within a
    sequence, and waits for the device to answer. A window is always one sequence."""
    previous = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = previous


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of one module. The module itself stays in place, so its attributes remain readable."""
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous
