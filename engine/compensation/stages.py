"""The blocks of a model in the order in which the stream passes them, and what a mask leaves of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.compensation.projections import (
    NUM_TOKENS,
    Projection,
    Projections,
    find_projections,
    probe,
    run_block,
    tolerance,
)
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder

Stage = tuple[Block, ...]
"""Blocks that read the same stream: one, or the attention and the MLP of a layer in which they are side by side."""


@dataclass(frozen=True)
class FittedStage:
    """What it takes to solve for the weights of a stage, without the model."""

    number: int
    blocks: Stage
    """The blocks whose projections are fitted, together."""
    names: tuple[str, ...]
    """Paths of their projections in the dense model."""
    widths: tuple[int, ...]
    scales: tuple[float, ...]
    are_transposed: tuple[bool, ...]
    num_free: int
    """Number of biases that are fitted: 1 if a projection has one, else 0."""
    is_before_gap: bool


@dataclass(frozen=True)
class Stages:
    """What can be fitted in a model without a mask's blocks."""

    all: Sequence[Stage]
    mask: Mask
    projections: Mapping[Block, Projection]
    """Those of the kept blocks that can be fitted."""
    reasons: Mapping[Block, str]
    """Why the other kept blocks cannot be fitted."""

    @classmethod
    def of(cls, decoder: Decoder, mask: Mask, found: Projections | None = None) -> Stages:
        """found: from `find_projections`, if it was called before. Raises UserError if nothing can be fitted in this
        model."""
        stages, found = _stages(decoder), find_projections(decoder) if found is None else found
        kept = {block: one for block, one in found.items() if block not in mask.absent}
        reasons = {block: one for block, one in kept.items() if isinstance(one, str)}
        projections = {block: one for block, one in kept.items() if isinstance(one, Projection)}
        for block, number in mask.lacking.items():
            if block in projections:
                inputs = decoder.narrow[block].sizes[decoder.narrow[block].linears.outward]
                projections[block] = replace(projections[block], width=decoder.shape.width(block, number) * inputs)
        for block in (block for stage in stages if len(stage) > 1 for block in stage if block in projections):
            if projections[block].gain is not None:
                del projections[block]
                reasons[block] = "a norm follows its output projection, and its stream is shared with another block"
        if not projections:
            raise UserError(
                f"a model of type {decoder.model.config.model_type!r} cannot be compensated: "
                f"{' and '.join(sorted(set(reasons.values())))}."
            )
        return cls(stages, mask, projections, reasons)

    def kept(self, number: int) -> Stage:
        return tuple(block for block in self.all[number] if block not in self.mask.absent)

    def fitted(self, number: int) -> Stage:
        """Return the blocks of a stage whose projections are fitted, together."""
        return tuple(block for block in self.all[number] if block in self.projections)

    def after(self, number: int) -> int:
        """Return the next stage with a kept block, or the number of stages."""
        later = (stage for stage in range(number + 1, len(self.all)) if self.kept(stage))
        return next(later, len(self.all))

    def is_before_gap(self, number: int) -> bool:
        """Whether blocks are absent between a stage and the next kept one. Absent blocks of the stage itself count, and
        so do their groups."""
        return any(self.is_changed(stage) for stage in range(number, self.after(number)))

    def is_changed(self, number: int) -> bool:
        """Whether a block of a stage is absent, or lacks groups."""
        return any(block in self.mask.absent or block in self.mask.lacking for block in self.all[number])

    @cached_property
    def to_fit(self) -> list[FittedStage]:
        """The stages to fit, in order: from the one before the first gap on, those with a projection."""
        first = min((stage for stage in range(len(self.all)) if self.is_changed(stage)), default=len(self.all))
        numbers = [stage for stage in range(len(self.all)) if self.after(stage) > first and self.fitted(stage)]
        return [self._described(number) for number in numbers]

    def _described(self, number: int) -> FittedStage:
        blocks = self.fitted(number)
        found = [self.projections[block] for block in blocks]
        return FittedStage(
            number,
            blocks,
            names=tuple(one.name for one in found),
            widths=tuple(one.width for one in found),
            scales=tuple(one.scale for one in found),
            are_transposed=tuple(one.is_transposed for one in found),
            num_free=int(any(one.weights.bias is not None for one in found)),
            is_before_gap=self.is_before_gap(number),
        )


def check_fittable(decoder: Decoder) -> None:
    """Raise UserError for a model that cannot be compensated, as far as its family tells. No weights are needed."""
    if decoder.architecture.has_rest:
        raise UserError(
            f"a model of type {decoder.model.config.model_type!r} cannot be compensated: its layers do something to "
            f"the stream beside their blocks."
        )


@torch.inference_mode()
def _stages(decoder: Decoder) -> list[Stage]:
    check_fittable(decoder)
    ids = torch.arange(NUM_TOKENS, device=decoder.device)[None] % decoder.model.config.vocab_size
    stream = decoder.embed(ids)
    stages: list[Stage] = []
    with decoder.selective():
        for layer, device in enumerate(decoder.layer_devices):
            stream = stream.to(device)
            mha, mlp = Block(Kind.MHA, layer), Block(Kind.MLP, layer)
            tried = probe(partial(decoder.run_layer, layer), stream)
            after = decoder.run_layer(layer, tried)
            middle = run_block(decoder, mha, tried)
            one_by_one = run_block(decoder, mlp, middle)
            side_by_side = middle + run_block(decoder, mlp, tried) - tried
            size = (after - tried).abs().max()
            errors = [float((found - after).abs().max() / size) for found in (one_by_one, side_by_side)]
            if not min(errors) <= tolerance(stream.dtype):
                raise UserError(
                    f"a model of type {decoder.model.config.model_type!r} cannot be compensated: the blocks of layer "
                    f"{layer} are neither one after the other nor side by side in the stream."
                )
            found = [(mha,), (mlp,)] if errors[0] <= errors[1] else [(mha, mlp)]
            stages += [stage for stage in found if not decoder.shape.missing & set(stage)]
            stream = decoder.run_layer(layer, stream)
    return stages
