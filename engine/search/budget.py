"""How much is to be removed."""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.engine.errors import UserError


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
