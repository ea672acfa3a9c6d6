"""Run a Hugging Face decoder's own code layer by layer and row by row.

No part of a model's forward is reimplemented. The model's own forward runs once while its layers record their
arguments; after that the layers are called one at a time. Attention and MLP modules compute only the rows that keep
them and return zeros for the others. In a residual architecture, a zero output is equivalent to an absent block.

Shapes: N sequences in a call (rows x windows), T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.given import Beside, Call, Given
from blockpruner.engine.model.narrowing import Narrow, changes_of_order, find_narrow, without_shared
from blockpruner.engine.model.outputs import Outputs, failures_told, learn_outputs
from blockpruner.engine.model.selecting import InlineMlp, RowChoice, Selector
from blockpruner.engine.model.shapes import shape_of
from blockpruner.engine.model.streaming import LayerStream
from blockpruner.engine.model.weights import Changes
from blockpruner.engine.work.shape import ModelShape


class Decoder:
    """A causal language model as a list of layers, each with an attention and an MLP block."""

    def __init__(
        self,
        model: PreTrainedModel,
        layer_devices: Sequence[torch.device] | None = None,
        layer_stream: LayerStream | None = None,
    ) -> None:
        """layer_devices: device of each layer; None means the model's device for all. layer_stream: what copies the
        layers there, if they are streamed."""
        self.architecture = architecture_of(model)
        self.model = model.eval()
        self.layers: list[nn.Module] = list(model.get_submodule(self.architecture.layers))
        self.layer_devices = layer_devices or [self.device] * len(self.layers)
        self._layer_stream = layer_stream
        self._order: ChannelOrder | None = None
        self._arguments: dict[int, list[Call]] = {}
        """For windows of T tokens, the arguments that the model passes to each layer in addition to the stream."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def free_bytes(self) -> int | None:
        """Memory that the weights leave free on the fullest device, in bytes; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return min(torch.cuda.mem_get_info(device)[0] for device in {self.device, *self.layer_devices})

    @cached_property
    def outputs(self) -> list[Outputs]:
        """What each layer and its blocks return. The first use runs the model once."""
        return learn_outputs(self.model, self.architecture, self.layers)

    @cached_property
    def shape(self) -> ModelShape:
        name = f"model type {self.model.config.model_type!r}"
        with failures_told(f"{name} is not supported: the sizes of its blocks cannot be read, which fails with"):
            return shape_of(self.model, self.architecture, self.layers, self.narrow)

    @cached_property
    def narrow(self) -> dict[Block, Narrow]:
        """The blocks whose groups can be removed one by one. `narrowing_check` verifies them."""
        blocks = [Block(kind, layer) for kind in (Kind.MHA, Kind.MLP) for layer in range(len(self.layers))]
        found = {block: find_narrow(self.architecture, self.layers[block.layer], block.kind) for block in blocks}
        return without_shared({block: one for block, one in found.items() if one is not None})

    def put_in_order(self, order: ChannelOrder | None) -> None:
        """Bring the channels and KV heads of the blocks that an order names into it; None: back into the dense model's.
        What the model computes stays the same, up to rounding.

        Weights of a streamed model are brought into the order on their way to the device.
        """
        before, self._order = self._order, order
        if before is not None and order is not None and before.digest == order.digest:
            return
        changes = {} if order is None else changes_of_order(self.narrow, order, self.layer_devices)
        if self._layer_stream is not None:
            self._layer_stream.change(changes)
            return
        if before is not None:
            _change(changes_of_order(self.narrow, before, self.layer_devices, back=True))
        _change(changes)

    def embed(self, windows: Tensor) -> Tensor:
        """Return the stream [N, T, H] that enters the first layer for token ids [N, T]. Raises UserError if layers are
        given more than that which differs from sequence to sequence: those need `start`."""
        if self.architecture.gives_more(self.model):
            raise UserError(
                f"expected a model whose layers are given their stream alone, got one of type "
                f"{self.model.config.model_type!r}, whose layers are given values of the tokens, too, or what earlier "
                f"ones left."
            )
        return self.start(windows)[0]

    def start(self, windows: Tensor) -> tuple[Tensor, Beside]:
        """Return the stream [W, T, H] that enters the first layer for token ids [W, T], and what layers are given
        beside it."""
        calls = self.record(windows)
        num_tokens = windows.shape[1]
        if num_tokens not in self._arguments:
            # Record with one sequence, so that arguments that depend on the batch size broadcast to any number of rows.
            one = calls if windows.shape[0] == 1 else self.record(windows[:1])
            self._arguments[num_tokens] = [(args[1:], kwargs) for args, kwargs in one]
        places = self.architecture.by_token
        values = [{at: args[at] for at in places if at < len(args) and args[at] is not None} for args, _ in calls]
        return calls[0][0][0], Beside(values)

    def arguments(self, num_tokens: int) -> list[Call]:
        """Return what each layer is given beside the stream, for windows of a length that `embed` has seen."""
        return self._arguments[num_tokens]

    def run_layer(
        self,
        layer: int,
        stream: Tensor,
        *,
        attention: RowChoice | None = None,
        mlp: RowChoice | None = None,
        given: Given | None = None,
    ) -> Tensor:
        """Run the layer's own forward over a stream [N, T, H]. A RowChoice restricts a block to some sequences, and
        works only inside `selective()`. given: what the layer is given beside the stream for these sequences; what its
        mixer leaves for later ones is added to it."""
        args, kwargs = self._arguments[stream.shape[1]][layer]
        sharing = self.architecture.sharing
        if given is not None:
            args, kwargs = given.put_into((args, kwargs), stream.device, sharing.argument if sharing else "", attention)
        for name in self.architecture.batched_arguments:
            kwargs = {**kwargs, name: torch.cat([kwargs[name]] * len(stream))}
        if attention is not None or mlp is not None:
            self._choose(layer, attention, mlp)
        try:
            output = self.layers[layer](stream, *args, **kwargs)
        finally:
            if attention is not None or mlp is not None:
                self._choose(layer, None, None)
        if given is not None and sharing is not None:
            given.take_from(kwargs[sharing.argument], attention)
        return output[0] if isinstance(output, tuple | list) else output

    def logits(self, stream: Tensor) -> Tensor:
        """Return the logits [N, T, V] for the stream [N, T, H] after the last layer.

        Runs the model's own forward with every layer passing on the given stream, so that the final norm, the output
        projection, scales and soft caps are applied.
        """
        ids = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)

        def pass_on(layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._as_returned_by(layer, stream)

        with self._layer_forwards(pass_on):
            return self.model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def selective(self) -> Iterator[None]:
        """Allow row choices in `run_layer` within this context. Leaving it always restores the modules."""
        with ExitStack() as stack:
            self._selectors: list[dict[Kind, list[Selector | InlineMlp]]] = []
            for number in range(len(self.layers)):
                kinds = (Kind.MHA, Kind.MLP)
                self._selectors.append({kind: self._select(number, kind, stack) for kind in kinds})
            yield

    def _select(self, number: int, kind: Kind, stack: ExitStack) -> list[Selector | InlineMlp]:
        """Replace the forwards of a block's modules, and return what replaces them."""
        names, layer, outputs = self.architecture, self.layers[number], self.outputs[number]
        modules = {name: layer.get_submodule(name) for name in names.modules_of(layer, kind)}
        if kind is Kind.MLP and names.inline_mlp:
            first, last = modules.values()
            inline = InlineMlp(first.forward, last.forward)
            stack.enter_context(forward_replaced(first, inline.first))
            stack.enter_context(forward_replaced(last, inline.last))
            return [inline]
        found: list[Selector | InlineMlp] = []
        for name, module in modules.items():
            selector = Selector(
                module.forward,
                num_outputs=outputs.modules.get(name),
                adds_residual=kind in names.residual_in,
                batched_arguments=names.batched_arguments if kind is Kind.MHA else (),
                narrowed=partial(self._narrowed, Block(kind, number)),
            )
            stack.enter_context(forward_replaced(module, selector))
            found.append(selector)
        return found

    def _narrowed(self, block: Block, lacks: int) -> AbstractContextManager[None]:
        """Let a block compute without some of its groups."""
        return self.narrow[block].running(self.shape.width(block, lacks))

    def _choose(self, layer: int, attention: RowChoice | None, mlp: RowChoice | None) -> None:
        for kind, choice in ((Kind.MHA, attention), (Kind.MLP, mlp)):
            for selector in self._selectors[layer][kind]:
                selector.choice = choice

    def record(self, windows: Tensor) -> list[Call]:
        """Return the arguments of each layer when the model runs on `windows` with layers that pass on the stream."""
        calls: dict[int, Call] = {}

        def recorder(layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[layer] = ((hidden, *args), kwargs)
            return self._as_returned_by(layer, hidden)

        with self._layer_forwards(recorder):
            self.model.base_model(input_ids=windows, use_cache=False)
        return [calls[layer] for layer in range(len(self.layers))]

    @contextmanager
    def _layer_forwards(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Replace the forward of each layer by `forward`, which is also told the layer's number."""
        with ExitStack() as stack:
            self.outputs  # noqa: B018 - must be learnt before the forwards are replaced
            stack.enter_context(_nothing_packed())
            for index, layer in enumerate(self.layers):
                stack.enter_context(forward_replaced(layer, partial(forward, index)))
            yield

    def _as_returned_by(self, layer: int, stream: Tensor) -> Any:
        """Return the stream as this layer does: on its own, or as the first element of a tuple."""
        length = self.outputs[layer].layer
        return stream if length is None else (stream, *[None] * (length - 1))


def _change(changes: Changes) -> None:
    for (owner, name), change in changes.items():
        parameter = owner.get_parameter(name)
        parameter.data = change(parameter.data)


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
