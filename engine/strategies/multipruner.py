"""MultiPruner (arXiv 2501.09949): whole blocks, then groups of the channels of MLPs, then heads of attentions.

Each stage is a greedy search that ends at its share of the ratio. As in the published code (run_multipruner.py in
IntelLabs/Hardware-Aware-Automated-Machine-Learning), the shares are 44, 52 and 4 %, a stage ends with the first removal
that reaches its share, and the last group of a block stays. There are three differences:

- A group is a quarter of an MLP's channels, or a KV head with its query heads. The code takes 1,024 channels, and 128
  rows of the queries.
- All stages score the same text. The code draws 256 rows for the first stage, and 128 for the others.
- A stage that has no candidates left leaves the rest of its share to the next one. There the code fails.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import ClassVar

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask, OrderedBy, Units
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.oracle import Candidate, Found, Oracle, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.strategies.greedy import best_step
from blockpruner.engine.work.shape import ModelShape

STAGES = ((Units.BLOCKS, 0.44), (Units.CHANNELS, 0.96), (Units.HEADS, 1.0))
"""What goes in each stage, and the part of the ratio that is gone when it ends."""
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
        _stages(space)

    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        base, steps = oracle.dense, list[Step]()
        for stage in _stages(space):
            while candidates := _candidates(stage, base.mask):
                steps.append(best_step(stage, oracle, candidates, base))
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
            if candidates := _candidates(stage, mask):
                size = fmean(space.share(candidate.mask) for candidate in candidates) - space.share(mask)
                assert stage.budget.ratio is not None
                num_steps = max(0, math.ceil((stage.budget.ratio - gone) / size))
                flops += stage.greedy_flops(mask, num_tokens, len(candidates), num_steps)
                gone += num_steps * size
        return flops


def check_narrowable(shape: ModelShape) -> None:
    """Raise UserError if no MLP of a model can lose channels, or no attention can lose KV heads."""
    for kind, (blocks, parts) in NAMES.items():
        if not any(shape.can_narrow(Block(kind, layer)) for layer in range(shape.num_layers)):
            raise UserError(
                f"expected a model whose {blocks} can lose {parts} for MultiPruner, got one whose {blocks} can only be "
                f"removed as a whole; use another strategy or method."
            )


def _stages(space: SearchSpace) -> list[SearchSpace]:
    """Return the space of each stage. Raises UserError if no mask of a stage reaches its share."""
    assert space.budget.ratio is not None
    return [replace(space, units=units, budget=Budget(ratio=part * space.budget.ratio)) for units, part in STAGES]


def _candidates(stage: SearchSpace, mask: Mask) -> list[Candidate]:
    """Return what may go next in a stage: in one that cuts blocks, groups only."""
    found = stage.candidates(mask)
    return [each for each in found if each.block.part is not None] if stage.units.cut else found
