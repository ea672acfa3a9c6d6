"""Greedy's removal order for a fraction of its work (not from a paper; docs/results/search.md shows how well it holds).

A candidate's increase in loss changes little from step to step, so an earlier measurement stays a good guess. Each
step scores the likely leaders on all windows. It scores every other candidate on growing shares of the windows while
the candidate may still beat the best leader, and does not score candidates that cannot. A removal is always decided by
a score over all windows; estimates only decide which candidates need no full score.

With a tolerance, only the removed candidate is scored on all windows: candidates race on growing shares of the windows
until none may beat the best one by more than the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from blockpruner.engine.blocks import Block, Granularity, Mask, Units
from blockpruner.engine.errors import UserError
from blockpruner.engine.score import Score
from blockpruner.engine.search.drift import Drift
from blockpruner.engine.search.oracle import Candidate, Estimate, Found, Oracle, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.work.units import cut

LEADERS = 2
"""Number of candidates with the lowest estimates that may be scored in full at once."""
DOUBT = 2.25
"""A candidate is dropped if it is worse than the best one by this many standard errors. On recorded SmolLM2 searches,
2.0 was the smallest value with which every step was right."""
STALE_DOUBT = 3.0
"""DOUBT for a candidate that has not been scored in this step."""
FIRST_DOUBT = 3.0
"""DOUBT in the first step, which has no earlier measurements."""
FIRST_MARGIN = 0.03
"""Additional nats by which a candidate must be worse in the first step. Candidates that are close now lead in later
steps, so it pays to score them in full."""
TOLERANT_DOUBT = 1.5
"""DOUBT with a tolerance."""
TOLERANT_STALE_DOUBT = 2.0
"""STALE_DOUBT with a tolerance."""
TOLERANT_FIRST_DOUBT = 2.0
"""FIRST_DOUBT with a tolerance."""
NUM_SHARES = 8
"""Number of shares into which the windows are cut for growing samples."""
ALL_SHARES_GROW = (1, 2, 4)
"""Numbers of shares after which the first step drops candidates."""
SAVING = {Granularity.MIX: 9.0, Granularity.MHA: 5.5, Granularity.MLP: 5.5, Granularity.LAYER: 6.5}
"""Naive work divided by the work of this search on SmolLM2, by kind of blocks (docs/results/search.md)."""
SAVING_OF_GROUPS = 7.0
"""The same for channels, to 30 % of the parameters on 8 windows."""


class Lazy(Strategy):
    name = "lazy"
    about = "nearly always finds greedy's order, at about a tenth of the plain loop's work"
    heeds = frozenset({"units", "per", "max_perplexity", "audit", "compensate"})
    grows = True

    tolerance: float | Literal["1se"] = Field(default=0.0, examples=["NATS|1se"])
    """Ignore differences in loss up to this many nats. `1se`: one standard error of the difference between a candidate
    and the best one over all windows."""

    @field_validator("tolerance", mode="before")
    @classmethod
    def _check(cls, tolerance: Any) -> Any:
        if tolerance == "1se":
            return tolerance
        try:
            nats = float(tolerance)
        except (TypeError, ValueError):
            nats = math.nan
        if not 0 <= nats < math.inf:
            raise UserError(f"expected `tolerance` in nats, such as 0.002, or 1se, got {tolerance!r}.")
        return nats

    @property
    def nats(self) -> float | None:
        """The tolerance; None for one standard error."""
        return None if self.tolerance == "1se" else self.tolerance

    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        base, last, is_refitted = oracle.dense, None, False
        shares = _shares(oracle.groups)
        drift = Drift(space, [len(share) for share in oracle.groups], base.num_targets)
        steps: list[Step] = []
        while candidates := space.candidates(base.mask):
            # Each step starts with another share, so that over several steps all windows are used.
            turn = len(steps) * (3 if len(shares) % 3 else 1) % len(shares)
            race = _Race(self.nats, oracle, drift, candidates, base, [*shares[turn:], *shares[:turn]])
            if last is None:
                race.begin()
            else:
                drift.advance(last, is_refitted=is_refitted)
                race.go_on()
            if not race.finite:  # every candidate scored so far failed, so score all, as greedy does
                race.score_all()
            chosen = [candidate for candidate in candidates if candidate.block in race.exact]
            scores = [race.exact[candidate.block] for candidate in chosen]
            best = space.best(chosen, scores, base)
            if scores[best].value > space.max_value:
                break
            step = Step(
                block=chosen[best].block,
                score=scores[best],
                candidates=candidates,
                scores=scores,
                estimates=race.estimates(),
            )
            last = step.block
            if last.part is not None:
                drift.succeed(last, space.next_unit(last.whole, step.score.mask))
            drift.forget(last)
            steps.append(step)
            base = oracle.removed(step)
            is_refitted = base != step.score
        return Found.by(steps)

    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        naive = 2 * space.greedy_flops_left(mask, num_tokens)  # greedy costs half a forward per candidate
        return naive / saving(space.units, space.blocks)


def saving(units: Units, blocks: Granularity) -> float:
    """Return how many times less work than the plain loop this search takes, as measured on SmolLM2."""
    return SAVING_OF_GROUPS if units.cut else SAVING[blocks]


class _Race:
    """One step of the search: decides on how many windows each candidate is scored."""

    def __init__(
        self,
        tolerance: float | None,
        oracle: Oracle,
        drift: Drift,
        candidates: Sequence[Candidate],
        base: Score,
        shares: Sequence[Sequence[range]],
    ) -> None:
        self._tolerance = tolerance
        self._oracle = oracle
        self._drift = drift
        self._base = base
        self._shares = shares
        self._candidates = {candidate.block: candidate for candidate in candidates}
        self.exact: dict[Block, Score] = {}
        self._sums: dict[Block, dict[int, float]] = {}

    def begin(self) -> None:
        """Run the first step: score all candidates on one share, the better ones on more, the remaining ones in
        full."""
        tolerance = self._tolerance
        doubt_and_margin = (FIRST_DOUBT, FIRST_MARGIN) if tolerance == 0 else (TOLERANT_FIRST_DOUBT, 0.0)
        racing, done = list(self._candidates), 0
        for stop in (number for number in ALL_SHARES_GROW if number < len(self._shares)):
            self._sample(racing, done, stop)
            done = stop
            racing = self._drift.contenders(racing, *doubt_and_margin, tolerance)
        if tolerance != 0 and done and racing:
            racing = [self._drift.leader(racing)]
        self._sample(racing, done, len(self._shares))
        self._drift.settle()

    def go_on(self) -> None:
        """Run a later step."""
        # Candidates that failed in an earlier step have no estimate, and may not fail now.
        failed = [block for block in self._candidates if not self._drift.is_finite(block)]
        order = sorted((block for block in self._candidates if block not in failed), key=self._drift.estimate)
        if self._tolerance == 0:
            self._compare_all(failed, order)
        else:
            self._sample(failed, 0, len(self._shares))
            self._settle_for_one(order)

    def _settle_for_one(self, order: Sequence[Block]) -> None:
        """Race all candidates that may beat the best one by more than the tolerance, and score the winner in full."""
        doubt, number = TOLERANT_STALE_DOUBT, 0
        racing = list(order)
        while racing := [block for block in racing if self._drift.is_finite(block)]:
            best = min(racing, key=self._drift.estimate)
            racing.remove(best)
            racing = [best, *self._drift.rivals(racing, best, doubt, self._tolerance)]
            if len(racing) == 1 or number == len(self._shares):
                self._sample([best], number, len(self._shares))
                return
            self._sample(racing, number, number + 1)
            doubt, number = TOLERANT_DOUBT, number + 1

    def _compare_all(self, failed: Sequence[Block], order: Sequence[Block]) -> None:
        """Score the likely leaders in full, then the candidates that may beat them."""
        leaders = [*failed, *order[:1]]
        if order:
            leaders += self._drift.rivals(order[1:LEADERS], order[0], DOUBT, self._tolerance)
        self._sample(leaders, 0, len(self._shares))
        rest = [block for block in order if block not in leaders]
        for number in range(len(self._shares)):
            if self.finite:
                best = min(self.finite, key=self._drift.estimate)
                doubt = DOUBT if number else STALE_DOUBT
                rest = self._drift.rivals(rest, best, doubt, self._tolerance)
            if not rest:
                return
            self._sample(rest, number, number + 1)
            rest = [block for block in rest if self._drift.is_finite(block)]

    @property
    def finite(self) -> list[Block]:
        """Candidates with a finite score over all windows."""
        return [block for block, score in self.exact.items() if math.isfinite(score.value)]

    def score_all(self) -> None:
        self._sample([block for block in self._candidates if block not in self.exact], 0, len(self._shares))

    def estimates(self) -> list[Estimate]:
        return [
            Estimate(self._candidates[block].mask, self._base.value + self._drift.increase(block), len(sums))
            for block, sums in self._sums.items()
            if block not in self.exact
        ]

    def _sample(self, blocks: Sequence[Block], first: int, stop: int) -> None:
        """Score candidates on the shares from `first` up to but not including `stop`."""
        if not blocks or first == stop:
            return
        groups = [group for share in self._shares[first:stop] for group in share]
        windows = [window for group in groups for window in group]
        for block, score in zip(
            blocks, self._oracle.score([self._candidates[block].mask for block in blocks], groups), strict=True
        ):
            self._drift.observe(block, self._base, windows, score.window_sums)
            sums = self._sums.setdefault(block, {})
            sums.update(zip(windows, score.window_sums, strict=True))
            if len(sums) == len(self._base.window_sums):
                in_order = tuple(sums[window] for window in range(len(sums)))
                self.exact[block] = Score(score.mask, in_order, score.num_targets)
        self._drift.calibrate()


def _shares(groups: Sequence[range]) -> list[list[range]]:
    """Cut the groups of windows into nearly equal shares, in order."""
    number = min(NUM_SHARES, len(groups))
    return [list(groups[first:stop]) for first, stop in cut(len(groups), number)]
