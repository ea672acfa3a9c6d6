"""The search space: which blocks may be removed, how many, and which of several candidates is best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask, Mixers, Units
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.score import Score
from blockpruner.engine.search.budget import Budget, Per
from blockpruner.engine.search.oracle import Candidate
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.times import BlockTimes

NOTHING = Mask()


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    shape: ModelShape
    blocks: Granularity
    budget: Budget
    keep: frozenset[Block] = field(default_factory=frozenset)
    """MHA and MLP blocks that are never removed."""
    max_mha: int | None = None
    """Maximum number of MHA blocks to remove."""
    max_mlp: int | None = None
    """Maximum number of MLP blocks to remove."""
    mixers: Mixers = Mixers.ALL
    """Which mixers may be removed."""
    units: Units = Units.BLOCKS
    """Which blocks go in groups, where they have such."""
    per: Per = Per.BLOCK
    """What the increase in loss is divided by to rank removals."""
    times: BlockTimes | None = None
    """What blocks cost in time, if that matters."""
    max_value: float = math.inf
    """Maximum loss in nats. A search stops before a mask with a higher loss."""

    def __post_init__(self) -> None:
        """Raise UserError if no mask of this space meets the budget."""
        if self.blocks is Granularity.LAYER and (self.max_mha, self.max_mlp) != (None, None):
            raise UserError("expected `max_mha` and `max_mlp` with single blocks, got them with `blocks=layer`.")
        if self.units.cut and not any(map(self.is_cut, self.all_blocks)):
            kinds = {Units.CHANNELS: "MLPs", Units.HEADS: "attentions"}.get(self.units, "blocks")
            raise UserError(
                f"expected a model with {kinds} of which parts can be removed for `units={self.units}`, got one whose "
                f"{kinds} can only be removed as a whole; use `units=blocks`."
            )
        for block in self.keep:
            if block.layer >= self.shape.num_layers:
                raise UserError(
                    f"expected `keep` of blocks in layers 0 to {self.shape.num_layers - 1}, got {block}, which the "
                    f"model does not have."
                )
        limits = "".join(
            f", with {option}"
            for option, given in (
                ("`keep`", bool(self.keep)),
                ("`max_mha`", self.max_mha is not None),
                ("`max_mlp`", self.max_mlp is not None),
            )
            if given
        )
        largest = self._largest()
        if not largest:
            raise UserError(
                f"expected at least one block that may be removed; {self.blocks} search{limits} leaves none."
            )
        attention = "" if self.blocks is Granularity.MLP else ", and one attention must stay"
        most_removals = self.num_removed(Mask.of(largest))
        if self.budget.num_remove is not None and self.budget.num_remove > most_removals:
            raise UserError(
                f"expected `num_remove` from 1 to {most_removals} ({self.blocks} search over "
                f"{len(self.all_blocks)} blocks{limits}{attention}), "
                f"got {self.budget.num_remove}."
            )
        if self.budget.budget_ms is not None and self.times is not None:
            least = self.times.without(Mask.of(largest))
            if not least <= self.budget.budget_ms < self.times.dense:
                raise UserError(
                    f"expected `budget_ms` from {least:.3g} (without all that {self.blocks} search can remove{limits}) "
                    f"to below {self.times.dense:.3g}, which the dense model takes, got {self.budget.budget_ms:g}."
                )
        most = self.shape.ratio(Mask.of(largest))
        if self.budget.ratio is not None and self.budget.ratio > most:
            raise UserError(
                f"expected `ratio` of at most {most:.4f} (all that {self.blocks} search can remove from this "
                f"model{limits}), got {self.budget.ratio}."
            )

    @cached_property
    def all_blocks(self) -> list[Block]:
        """All blocks (or layers) that the search may remove, in the official order."""
        found = self.shape.candidates(self.blocks)
        if self.mixers is Mixers.ALL:
            return found
        return [block for block in found if block.kind is Kind.MLP or self.shape.attends(block.layer)]

    def is_cut(self, block: Block) -> bool:
        """Whether a block goes in groups."""
        return block.kind in self.units.cut and self.shape.can_narrow(block)

    def next_unit(self, block: Block, mask: Mask) -> Block:
        """Return what goes next of a block (or layer) that a mask keeps: its last group, or the block itself if it has
        only one."""
        number = self.shape.num_groups(block) - mask.lacking.get(block, 0) if self.is_cut(block) else 1
        return block if number == 1 else Block(block.kind, block.layer, number)

    def _largest(self, mask: Mask = NOTHING) -> list[Block]:
        """Return the largest set of the largest blocks that can still be removed together, with the groups of
        blocks that must stay."""
        limits = {Kind.MHA: self.max_mha, Kind.MLP: self.max_mlp, Kind.LAYER: None}
        removable: list[Block] = []
        for kind in Kind:
            blocks = [block for block in self.all_blocks if block.kind is kind]
            gone = [block for block in blocks if set(block.parts) & mask.absent]
            free = [block for block in blocks if block not in gone and not self.keep & set(block.parts)]
            limit = limits[kind]
            most = len(blocks) if limit is None else min(limit, len(blocks))
            free.sort(key=lambda block: self.share(Mask(frozenset(block.parts))), reverse=True)
            last = None if kind is Kind.MLP else self._last_to_stay(free)
            if last:
                free.remove(last)
            number = max(0, most - len(gone))
            removable += free[:number]
            for block in filter(self.is_cut, [*free[number:], *([last] if last else [])]):
                removable += self.shape.groups(block)
        return removable

    def _last_to_stay(self, free: Sequence[Block]) -> Block | None:
        """Return the one of these mixers or layers that must stay so that the model can run: the last one with a KV
        cache. None if another one stays anyway."""
        last = set(self.shape.last_mixers)
        if last & self.keep:
            return None
        return next((block for block in reversed(free) if last & set(block.parts)), None)

    def size(self, block: Block) -> int:
        """Number of parameters of a whole block or layer."""
        return self.shape.num_removed(Mask.of([block]))

    def part_of_block(self, block: Block) -> float:
        """Return what goes in one step, as a share of the whole block's parameters: 1 unless it goes in groups."""
        if not self.is_cut(block.whole):
            return 1.0
        return self._share_of(block, Per.PARAMS) * self.shape.num_parameters / self.size(block.whole)

    def num_removed(self, mask: Mask) -> int:
        """Number of removals that lead to a mask: of blocks, of layers in a layer-level search, and of groups, of
        which a block that consists of them counts all."""
        if self.blocks is Granularity.LAYER:
            return sum(block.kind is Kind.MHA for block in mask.absent)
        present = mask.absent - self.shape.missing
        return sum(
            self.shape.block(block).num_groups if block.part is None and self.is_cut(block) else 1 for block in present
        )

    def removed(self, mask: Mask) -> list[Block]:
        """Return the removals that lead to a mask: the blocks (or layers) in the official order, and the groups of each
        from the last to the first."""
        found, lacking = list[Block](), mask.lacking
        for block in self.all_blocks:
            is_gone = mask.absent.issuperset(block.parts)
            groups = self.shape.groups(block) if self.is_cut(block) else []
            found += groups if is_gone else groups[: lacking.get(block, 0)]
            found += [block] if is_gone else []
        return found

    def returns(self, mask: Mask) -> list[Candidate]:
        """All masks with one block, layer or group given back, in the official order: of each block what went last."""
        last = {block.whole: block for block in self.removed(mask)}
        found = []
        for block, unit in last.items():
            groups = self.shape.groups(block) if unit.part is None and self.is_cut(block) else []
            found.append(Candidate(unit, Mask(mask.absent.difference(unit.parts).union(groups))))
        return found

    def is_met(self, mask: Mask) -> bool:
        if self.budget.num_remove is not None:
            return self.num_removed(mask) >= self.budget.num_remove
        return self.share(mask) >= self._target

    @property
    def _currency(self) -> Per:
        """What the budget counts."""
        return Per.PARAMS if self.budget.budget_ms is None else Per.MS

    @property
    def _target(self) -> float:
        """Share of all parameters, or of the dense model's time, that the budget asks to remove."""
        if self.budget.budget_ms is None:
            assert self.budget.ratio is not None
            return self.budget.ratio
        assert self.times is not None
        return 1 - self.budget.budget_ms / self.times.dense

    def share(self, mask: Mask, currency: Per | None = None) -> float:
        """Return the share of all parameters that a mask removes, or of the dense model's time. currency: PARAMS or MS;
        None for what the budget counts."""
        if (currency or self._currency) is Per.MS:
            assert self.times is not None
            return self.times.share(mask)
        return self.shape.ratio(mask)

    def _share_of(self, block: Block, currency: Per) -> float:
        """Return what goes in one step with a block, a layer or a group, as a share. Where groups go one by
        one, a whole block is what is left of it."""
        groups = self.shape.groups(block) if block.part is None and self.is_cut(block) else ()
        parts = [Mask(frozenset({group})) for group in groups]
        whole = self.share(Mask(frozenset(block.parts)), currency)
        return whole - sum(self.share(part, currency) for part in parts)

    def allows(self, mask: Mask) -> bool:
        """Whether the mask respects all limits. The budget is not checked."""
        whole = [block.kind for block in mask.absent if block.part is None]
        num_mha, num_mlp = whole.count(Kind.MHA), whole.count(Kind.MLP)
        return (
            not mask.absent.issuperset(self.shape.last_mixers)
            and num_mha <= (self.shape.num_layers if self.max_mha is None else self.max_mha)
            and num_mlp <= (self.shape.num_layers if self.max_mlp is None else self.max_mlp)
            and not self.keep & {block.whole for block in mask.absent}
        )

    def candidates(self, mask: Mask) -> list[Candidate]:
        """Candidates for the next removal, in the official order; empty once the budget is met."""
        if self.is_met(mask):
            return []
        return [candidate for candidate in self.neighbours(mask) if self.can_reach(candidate.mask)]

    def can_reach(self, mask: Mask) -> bool:
        """Whether the budget can still be met from this mask.

        With limits on the number of MHA or MLP blocks, removing small blocks can make a `ratio` or a time
        unreachable. A budget of `num_remove` can be reached in any order.
        """
        if self.budget.num_remove is not None or (self.max_mha, self.max_mlp) == (None, None):
            return True
        return self.share(Mask.of([*mask.absent, *self._largest(mask)])) >= self._target

    def neighbours(self, mask: Mask) -> list[Candidate]:
        """All allowed masks with one more block, layer or group absent. The budget is not checked."""
        units = [self.next_unit(block, mask) for block in self.all_blocks if not set(block.parts) & mask.absent]
        candidates = [Candidate(unit, mask.without(unit)) for unit in units]
        return [candidate for candidate in candidates if self.allows(candidate.mask)]

    def weight(self, block: Block) -> float:
        """Divisor for the increase in loss from removing a block: its share of all parameters or of the dense model's
        time, or 1."""
        return 1.0 if self.per is Per.BLOCK else self._share_of(block, self.per)

    def best(self, candidates: Sequence[Candidate], scores: Sequence[Score], base: Score) -> int:
        """Return the index of the candidate to remove: the one with the lowest loss (or the lowest increase over
        `base` for its weight). The first one wins ties. Candidates with a NaN or infinite loss are never chosen.

        Raises SearchFailed if no candidate has a finite loss.
        """
        finite = [index for index, score in enumerate(scores) if math.isfinite(score.value)]
        if not finite:
            raise SearchFailed(
                f"step {self.num_removed(base.mask) + 1}: all {len(scores)} candidates have a NaN or infinite loss."
            )

        def rank(index: int) -> float:
            if self.per is Per.BLOCK:
                return scores[index].value
            return (scores[index].value - base.value) / self.weight(candidates[index].block)

        return min(finite, key=rank)

    def num_steps_left(self, mask: Mask) -> int:
        """Number of removals until the budget is met: exact for `num_remove`, else estimated."""
        if self.budget.num_remove is not None:
            return max(0, self.budget.num_remove - self.num_removed(mask))
        # Assume that the next ones have the mean size of the removed ones, or of all blocks before the first removal.
        seen = mask if mask.absent else Mask.of(self.all_blocks)
        mean = sum(self.share(Mask(frozenset({block}))) for block in seen.absent) / self.num_removed(seen)
        return max(0, math.ceil((self._target - self.share(mask)) / mean))

    def greedy_flops_left(self, mask: Mask, num_tokens: int) -> float:
        """Approximate FLOPs of an exhaustive greedy search from `mask` on, for one window of `num_tokens` tokens."""
        return self.greedy_flops(mask, num_tokens, len(self.neighbours(mask)), self.num_steps_left(mask))

    def greedy_flops(self, mask: Mask, num_tokens: int, num_candidates: int, num_steps: int) -> float:
        """Approximate FLOPs of exhaustive steps from `mask` on, the first of them with `num_candidates` candidates.

        A step costs half a forward per candidate, since candidates share the trunk. Each removal makes forwards
        cheaper, and leaves fewer candidates: one less, where whole blocks go.
        """
        num_units = self.num_removed(Mask.of(self.shape.candidates(Granularity.MIX)))
        forward = self.shape.forward_flops(Mask(), num_tokens)
        num_left = num_units - self.num_removed(mask)
        return sum(
            forward / 2 * num_candidates * (1 - ahead / num_left) * (num_left - ahead) / num_units
            for ahead in range(min(num_steps, num_left))
        )
