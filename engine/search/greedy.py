"""The paper's search (section 4.3): in every step all remaining candidates are scored and the best one goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.blocks import Block, Granularity, Kind, Mask
from engine.errors import SearchFailed
from engine.search.budget import Budget
from engine.shape import ModelShape


@dataclass(frozen=True)
class Candidate:
    """A block that may go next, and the mask that then is in force."""

    block: Block
    mask: Mask


class Greedy:
    """Ask for candidates, tell their NLLs, until the budget is met."""

    def __init__(self, blocks: Granularity, budget: Budget, shape: ModelShape) -> None:
        budget.check(blocks, shape)
        self._remaining = blocks.candidates(shape.num_layers)
        self._budget = budget
        self._shape = shape
        self.mask = Mask()
        self.removed: list[Block] = []

    def ask(self) -> list[Candidate]:
        """All candidates of the next step in the official order; empty when the search is over."""
        if self._budget.is_met(self.mask, len(self.removed), self._shape):
            return []
        candidates = [Candidate(block, self.mask.without(block)) for block in self._remaining]
        return [candidate for candidate in candidates if self._keeps_attention(candidate.mask)]

    def tell(self, candidates: Sequence[Candidate], nlls: Sequence[float]) -> int:
        """Index of the candidate that goes: the lowest NLL, and among equals the earliest. One that is not finite is
        never chosen; if none is finite the search has failed."""
        finite = [index for index, nll in enumerate(nlls) if math.isfinite(nll)]
        if not finite:
            raise SearchFailed(
                f"step {len(self.removed) + 1}: all {len(candidates)} candidates have a NaN or infinite perplexity."
            )
        best = min(finite, key=lambda index: nlls[index])
        self.accept(candidates[best].block)
        return best

    def accept(self, block: Block) -> None:
        """Remove a block: the one just chosen, or one that an earlier run recorded."""
        self._remaining.remove(block)
        self.removed.append(block)
        self.mask = self.mask.without(block)

    def expected_flops(self, num_tokens: int) -> float:
        """About the work of all steps to come, on one window of `num_tokens` tokens: each costs half a forward a
        candidate, since candidates share the trunk, and forwards get cheaper with every block."""
        num_blocks = 2 * self._shape.num_layers
        forward = self._shape.forward_flops(Mask(), num_tokens)
        return sum(
            forward / 2 * max(0, len(self._remaining) - ahead) * (1 - (len(self.mask.absent) + ahead) / num_blocks)
            for ahead in range(self.num_steps_left())
        )

    def num_steps_left(self) -> int:
        """Exact for a number of blocks, foreseen for a ratio."""
        if self._budget.num_remove is not None:
            return self._budget.num_remove - len(self.removed)
        assert self._budget.ratio is not None
        # Blocks to come are like those that went; before the first, like all.
        sizes = [self._shape.num_removed(Mask.of([block])) for block in self.removed or self._remaining]
        to_remove = (self._budget.ratio - self._shape.ratio(self.mask)) * self._shape.num_parameters
        return max(0, math.ceil(to_remove * len(sizes) / max(1, sum(sizes))))

    def _keeps_attention(self, mask: Mask) -> bool:
        return any(mask.keeps(Kind.MHA, layer) for layer in range(self._shape.num_layers))
