"""The options of the whole way from a model to a smaller one."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from blockpruner.cluster.options import Placing, Replicas
from blockpruner.engine.blocks import Granularity, Units
from blockpruner.engine.checkpoint.format import Format
from blockpruner.engine.checkpoint.formats.gguf import GgufType
from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Names, check_name, listed
from blockpruner.engine.search.budget import Per, check_ratio, check_units
from blockpruner.engine.sections import Calibration, Model, Precision

RATIO = 0.2
"""Share of the parameters to remove unless something else is asked for."""
MOST = 0.5
"""Share up to which blocks are looked for if the perplexity is the bound."""


def _share(value: Any) -> Any:
    """Read 20% as 0.2."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            return value
    return value


class ShrinkConfig(Replicas, Placing, Precision, Calibration, Model):
    ratio: float | None = None
    """Share of the parameters to remove, between 0 and 1. Default: 0.2, if nothing else says how much."""
    num_remove: int | None = Field(default=None, ge=1)
    """Number of blocks to remove (of layers, with `blocks=layer`), instead of a share."""
    max_perplexity_increase: Annotated[float | None, BeforeValidator(_share)] = Field(
        default=None, gt=0, examples=["20%"]
    )
    """Remove as much as raises the perplexity by at most this share of the dense model's, on windows that neither the
    search nor the compensation has seen."""
    blocks: Granularity | None = None
    """Kind of blocks to remove. layer: whole layers; mix: attention and MLP blocks; mha or mlp: only that kind.
    Default: layer, and mix with `units` other than blocks."""
    units: Units = Units.BLOCKS
    """What one removal takes. blocks: a block; channels: of an MLP a quarter of its channels; heads: of an attention a
    KV head; all: both."""
    no_compensate: bool = False
    """Leave the compensation out."""
    perplexity: tuple[str, ...] = ()
    """Text to measure the result on, beside the windows that are kept back: wikitext2 (its test split), builtin, a file
    or a folder. May be repeated."""
    export: Names = Field(default=(), examples=["deci,gguf"])
    """Formats to export the result to, each in a folder of its name."""
    gguf_type: GgufType = GgufType.F16
    """Type of the weights in a `gguf` export."""
    dry_run: bool = False
    """Only say what would be done, with the command and the expected time of each part."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        budgets = ("ratio", "num_remove", "max_perplexity_increase")
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"expected one of {listed(f'`{name}`' for name in budgets)}, got {len(given)} of them.")
        check_ratio(self.ratio)
        check_units(self.units, self.removed)
        for name in self.export:
            check_name(Format.all(), "export", name)
        if "vanilla" in self.export and self.units.cut:
            raise UserError(
                f"expected `export` grouped, deci or gguf with `units={self.units}`, got vanilla, in which all layers "
                f"have one width; where they come out alike, `blockpruner export` writes it."
            )
        if self.gguf_type != GgufType.F16 and "gguf" not in self.export:
            raise UserError("expected `gguf_type` with `export=gguf`.")
        return self

    @property
    def removed(self) -> Granularity:
        """Kind of blocks that the search removes."""
        return self.blocks or (Granularity.MIX if self.units.cut else Granularity.LAYER)

    @property
    def budget(self) -> dict[str, Any]:
        """How much the search is to remove, and how it ranks removals: for a share of both kinds of blocks, per
        parameter, which was better than per block on two families (docs/results/recipes.md)."""
        if self.num_remove is not None:
            return {"num_remove": self.num_remove}
        ranked = {"per": Per.PARAMS} if self.removed is Granularity.MIX and not self.units.cut else {}
        return {"ratio": self.ratio or (RATIO if self.max_perplexity_increase is None else MOST), **ranked}
