"""MultiPruner (arXiv 2501.09949): whole blocks, then groups of the channels of MLPs, then heads of attentions.

Each stage is a greedy search that ends at its share of the ratio. As in the published code (run_multipruner.py in
IntelLabs/Hardware-Aware-Automated-Machine-Learning), the shares are 44, 52 and 4 %, a stage ends with the first removal
that reaches its share, and the last group of a block stays. There are three differences:

- A group is a quarter of an MLP's channels, or a KV head with its query heads. The code takes 1,024 channels, and 128
  rows of the queries.
- All stages score the same text. The code draws 256 rows for the first stage, and 128 for the others.
- A stage that has no candidates left, or none that limits allow, leaves the rest of its share to the next one. There
  the code fails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask, OrderedBy, Units
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.search.oracle import Candidate, Found, Oracle, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.strategies.greedy import best_step
from blockpruner.engine.work.shape import ModelShape

STAGES = ((None, 0.44), (Kind.MLP, 0.96), (Kind.MHA, 1.0))
"""Whose groups go in each stage (whole blocks in the first one), and the part of the ratio that is gone at its end."""
NAMES = {Kind.MLP: ("MLPs", "channels"), Kind.MHA: ("attentions", "KV heads")}


class MultiPruner(Strategy):
    name = "multipruner"
    about = "whole blocks, then channels of MLPs, then heads, each greedily up to its share (arXiv 2501.09949)"
    heeds = frozenset({"units"})
    ordered_by: ClassVar[OrderedBy] = OrderedBy.WEIGHTS

    def check(self, space: SearchSpace) -> None:
        if space.units is not Units.ALL:
            raise UserError(f"expected `units=all` with `strategy={self.name}`, got `units={space.units}`.")
        if space.blocks is not Granularity.MIX:
            raise UserError(f"expected `blocks=mix` with `strategy={self.name}`, got `blocks={space.blocks}`.")
        if space.budget.ratio is None:
            raise UserError(f"expected `ratio` with `strategy={self.name}`, whose stages remove shares of it.")
        check_narrowable(space.shape)

    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        base, steps = oracle.dense, list[Step]()
        for stage in _stages(space):
            while candidates := stage.candidates(base.mask):
                steps.append(best_step(space, oracle, candidates, base))
                base = oracle.removed(steps[-1])
        if not space.is_met(base.mask):
            raise SearchFailed(
                f"no channels or heads are left for the last stages: {space.share(base.mask):.4f} of the parameters "
                f"are gone, of `ratio` {space.budget.ratio}; use a smaller one."
            )
        return Found.by(steps)

    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        """Each stage removes units of the mean size of its candidates, until its share is gone."""
        flops, gone = 0.0, space.share(mask)
        for stage in _stages(space):
            if candidates := stage.candidates(mask):
                size = fmean(space.share(candidate.mask) for candidate in candidates) - space.share(mask)
                num_steps = max(0, math.ceil((stage.share - gone) / size))
                flops += space.greedy_flops(mask, num_tokens, len(candidates), num_steps)
                gone += num_steps * size
        return flops


@dataclass(frozen=True)
class Stage:
    space: SearchSpace
    kind: Kind | None
    """Whose groups go; None: whole blocks go."""
    share: float
    """Of all parameters, that is gone when the stage ends."""

    def candidates(self, mask: Mask) -> list[Candidate]:
        """Return what may go next, in the official order: nothing once the share is gone or if limits leave nothing."""
        space = self.space
        if space.share(mask) >= self.share:
            return []
        if self.kind is not None:
            of_kind = [each for each in space.neighbours(mask) if each.block.kind is self.kind]
            found = [each for each in of_kind if each.block.part is not None]
        else:
            whole = [block for block in space.all_blocks if block not in mask.absent]
            found = [each for block in whole if space.allows((each := Candidate(block, mask.without(block))).mask)]
        return [each for each in found if space.can_reach(each.mask)]


def check_narrowable(shape: ModelShape) -> None:
    """Raise UserError if no MLP of a model can lose channels, or no attention can lose KV heads."""
    for kind, (blocks, parts) in NAMES.items():
        if not any(shape.can_narrow(Block(kind, layer)) for layer in range(shape.num_layers)):
            raise UserError(
                f"expected a model whose {blocks} can lose {parts} for MultiPruner, got one whose {blocks} can only be "
                f"removed as a whole; use another strategy or method."
            )


def _stages(space: SearchSpace) -> list[Stage]:
    ratio = space.budget.ratio
    assert ratio is not None
    return [Stage(space, kind, part * ratio) for kind, part in STAGES]
