"""Compute an attention, another mixer or an MLP only for some sequences of a call; the others get what an absent block
gives.

Shapes: N sequences in a call (rows x windows), T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


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
    narrower: Mapping[int, RowChoice] = field(default_factory=dict)
    """Other sequences, for which the block lacks some of its groups, by the number of groups that it lacks."""

    @classmethod
    def nobody(cls, stream: Tensor) -> RowChoice:
        """Return the choice that makes a block absent for every sequence of a stream [N, T, H]."""
        none = torch.empty(0, dtype=torch.long, device=stream.device)
        return cls(none, none, none, num_sequences=len(stream))

    @classmethod
    def lacking(cls, stream: Tensor, number: int) -> RowChoice:
        """Return the choice that lets every sequence of a stream [N, T, H] pass a block that lacks some of its
        groups."""
        every = torch.arange(len(stream), device=stream.device)
        none, whole = cls.nobody(stream), cls(every, every, every, num_sequences=len(stream))
        return replace(none, narrower={number: whole})


class Selector:
    """Replaces the forward of a module of a block during a sweep."""

    def __init__(
        self,
        forward: Callable[..., Any],
        *,
        num_outputs: int | None,
        adds_residual: bool,
        batched_arguments: tuple[str, ...] = (),
        narrowed: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        """num_outputs: length of the tuple that the module returns; None for a tensor alone. narrowed: lets the module
        compute without some of its groups."""
        self.forward = forward
        self.batched_arguments = batched_arguments
        self.num_outputs = num_outputs
        self.adds_residual = adds_residual
        self.narrowed = narrowed
        self.choice: RowChoice | None = None
        """None means that every row is computed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        choice = self.choice
        if choice is None:
            return self.forward(*args, **kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        output = args[1].clone() if self.adds_residual else torch.zeros_like(hidden)
        others: list[Any] = [None] * ((self.num_outputs or 1) - 1)
        if len(choice.computed):
            others = self._run(choice, output, hidden, args[1:], kwargs)
        for number, narrower in choice.narrower.items():
            assert self.narrowed is not None
            with self.narrowed(number):
                others = self._run(narrower, output, hidden, args[1:], kwargs)
        return output if self.num_outputs is None else (output, *others)

    def _run(
        self, choice: RowChoice, output: Tensor, hidden: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """Compute the chosen sequences, and write them to `output`. Returns what the module returns beside them."""
        if hidden.ndim == 2:  # sequences and tokens in one dimension, as experts take them, with their routes
            rest = tuple(_chosen(v, choice) if isinstance(v, Tensor) and len(v) == len(hidden) else v for v in rest)
        elif self.adds_residual:
            rest = (rest[0].index_select(0, choice.computed), *rest[1:])
        for name in self.batched_arguments:  # equal for every sequence, so take the first ones
            number = len(kwargs[name]) // choice.num_sequences * len(choice.computed)
            kwargs = {**kwargs, name: kwargs[name][:number]}
        result = self.forward(_chosen(hidden, choice), *rest, **kwargs)
        stream, *others = result if isinstance(result, tuple) else (result,)
        # Llama 4's routed MLP returns sequences and tokens in one dimension even if it takes them in two.
        sequences = stream.reshape(len(choice.computed), -1, stream.shape[-1])
        by_sequence = output if output.ndim == 3 else output.unflatten(0, (choice.num_sequences, -1))
        by_sequence.index_copy_(0, choice.receivers, sequences.index_select(0, choice.sources))
        return others


def _chosen(values: Tensor, choice: RowChoice) -> Tensor:
    """Return the computed sequences of values [N, T, ...] or [N x T, ...], in the same form."""
    if values.ndim == 3:
        return values.index_select(0, choice.computed)
    return values.unflatten(0, (choice.num_sequences, -1)).index_select(0, choice.computed).flatten(0, 1)


class InlineMlp:
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
