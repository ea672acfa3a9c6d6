"""Options for how much to remove and for which blocks may be removed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from blockpruner.engine.blocks import Block, Granularity, Mixers, Units
from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Names, Options
from blockpruner.engine.work.times import TimeOf


class Budget(Options):
    """What to remove"""

    num_remove: int | None = Field(default=None, ge=1)
    """Number of blocks to remove (of layers, with `blocks=layer`; with other `units`, of whatever goes in one
    step)."""
    ratio: float | None = None
    """Share of the parameters to remove, between 0 and 1. Use it instead of `num_remove`."""
    budget_ms: float | None = Field(default=None, gt=0)
    """Milliseconds that the model may take for what `time_for` says. A search measures what blocks cost, unless `times`
    has a table of it. Use it instead of `num_remove` or `ratio`."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if sum(value is not None for value in (self.num_remove, self.ratio, self.budget_ms)) != 1:
            raise UserError("expected one of `num_remove`, `ratio` and `budget_ms`.")
        check_ratio(self.ratio)
        return self

    @property
    def budget(self) -> Budget:
        """Only these options."""
        return Budget(num_remove=self.num_remove, ratio=self.ratio, budget_ms=self.budget_ms)


def check_ratio(ratio: float | None) -> None:
    """Raise UserError unless `ratio` is None or lies between 0 and 1 (exclusive)."""
    if ratio is not None and not 0 < ratio < 1:
        raise UserError(f"expected `ratio` between 0 and 1 (exclusive), got {ratio}.")


def check_units(units: Units, blocks: Granularity) -> None:
    """Raise UserError if blocks of this kind do not go in such groups."""
    if units.cut and blocks not in (Granularity.MIX, *(Granularity(kind) for kind in units.cut)):
        fitting = " or ".join(("mix", *units.cut))
        raise UserError(f"expected `blocks` {fitting} with `units={units}`, got `blocks={blocks}`.")


class Per(StrEnum):
    BLOCK = "block"
    PARAMS = "params"
    MS = "ms"


class Limits(Options):
    """What may be removed"""

    blocks: Granularity = Granularity.MIX
    """Kind of blocks to remove. mix: attention and MLP blocks; mha or mlp: only that kind; layer: whole layers. mha is
    whatever mixes the tokens of a layer: attention, linear attention, Mamba or a convolution."""
    units: Units = Units.BLOCKS
    """What one removal takes. blocks: a block or a layer; channels: a block, but of an MLP the least important group of
    its channels, a quarter of them; heads: a block, but of an attention its least important KV head with its query
    heads; all: both."""
    mixers: Mixers = Mixers.ALL
    """Token mixers that may be removed. all: whatever they are; attention: only those with a KV cache."""
    per: Per = Per.BLOCK
    """Rank removals by the increase in loss per block, per removed parameter, or per millisecond (see `times`)."""
    times: Path | None = None
    """Table of what each block costs in time, as `blockpruner times` writes it. Default: a search that needs it
    measures it first, and writes it to times.json in the run directory."""
    time_for: TimeOf = TimeOf.DECODE
    """What counts as time. decode: one generated token; prefill: a prompt up to the first new token; both: a whole
    generation."""
    batch: int | None = Field(default=None, ge=1)
    """Number of prompts in one batch for which the search measures times. Default: 1."""
    context: int | None = Field(default=None, ge=1)
    """Number of tokens of a prompt for which the search measures times. Default: 512."""
    max_mha: int | None = Field(default=None, ge=0)
    """Remove at most N attention blocks."""
    max_mlp: int | None = Field(default=None, ge=0)
    """Remove at most N MLP blocks."""
    keep: Names = Field(default=(), examples=["mha.0,mlp.0,layer.0,…"])
    """Never remove these blocks."""
    max_perplexity: float | None = Field(default=None, ge=1)
    """Stop before a removal that would raise the calibration perplexity above this value."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if wrong := next((block for block in self.keep if Block.parse(block).part is not None), None):
            raise UserError(f"expected whole blocks for `keep`, got {wrong}.")
        check_units(self.units, self.blocks)
        return self
