"""How much is to be removed."""

from __future__ import annotations

from dataclasses import dataclass

from engine.blocks import Block, Granularity, Kind, Mask
from engine.errors import UserError
from engine.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Either K blocks (layers, for layer-level search), or a share of the parameters: removal goes on until the pruning
    ratio is reached."""

    num_remove: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.num_remove is None) == (self.ratio is None):
            raise UserError("expected either --num-remove K or --ratio R, and not both.")
        if self.num_remove is not None and self.num_remove < 1:
            raise UserError(f"expected --num-remove of at least 1, got {self.num_remove}.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(f"expected --ratio between 0 and 1 (exclusive), got {self.ratio}.")

    def is_met(self, mask: Mask, num_removed: int, shape: ModelShape) -> bool:
        if self.num_remove is not None:
            return num_removed >= self.num_remove
        assert self.ratio is not None
        return shape.ratio(mask) >= self.ratio

    def check(self, blocks: Granularity, shape: ModelShape) -> None:
        """Raise UserError if no search over these blocks can meet the budget."""
        candidates = blocks.candidates(shape.num_layers)
        if self.num_remove is not None:
            most = len(candidates) - (blocks is not Granularity.MLP)
            if self.num_remove > most:
                raise UserError(
                    f"expected --num-remove from 1 to {most} (the model has {len(candidates)} removable blocks, and "
                    f"one attention must stay), got {self.num_remove}."
                )
        if self.ratio is not None:
            most_removed = Mask.of(candidates)
            if blocks is not Granularity.MLP:
                most_removed = Mask(most_removed.absent - set(_smallest_last(blocks, shape).parts))
            if shape.ratio(most_removed) < self.ratio:
                raise UserError(
                    f"expected --ratio of at most {shape.ratio(most_removed):.4f} (all that {blocks} search can remove "
                    f"from this model), got {self.ratio}."
                )


def _smallest_last(blocks: Granularity, shape: ModelShape) -> Block:
    """The cheapest way to keep one attention."""
    kind = Kind.LAYER if blocks is Granularity.LAYER else Kind.MHA
    return min(
        (Block(kind, layer) for layer in range(shape.num_layers)), key=lambda block: shape.num_removed(Mask.of([block]))
    )
