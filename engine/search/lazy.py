"""Greedy's removal order for a fraction of its work (no paper; docs/method.md says how well that holds).

Candidates differ by little from step to step, so an increase that was measured once stays a good guess. In every step
the likely leaders are scored in full; every other candidate is scored on growing shares of the windows for as long as
it may still beat the best of them, and those that cannot are not scored at all. What counts for a removal is always a
score over all windows: an estimate only decides who need not be scored.

With a tolerance nobody is scored in full but the one that goes: candidates race on growing shares of the windows until
none may be better than the best one by more than the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.score import Score
from blockpruner.engine.search.drift import Drift
from blockpruner.engine.search.oracle import Candidate, Estimate, Found, Oracle, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.units import cut

LEADERS = 2
"""Candidates with the lowest estimates that are scored in full at once."""
DOUBT = 2.25
"""Standard errors by which a candidate must be worse than the best one to be dropped. On recorded SmolLM2 searches 2.0
was the least with which no step went wrong."""
STALE_DOUBT = 3.0
"""The same while a candidate was not scored in this step."""
FIRST_DOUBT = 3.0
"""The same in the first step, in which nothing is known yet."""
FIRST_MARGIN = 0.03
"""Nats by which a candidate must be worse besides, in the first step: those that are close now are the leaders of later
steps, and are better known in full."""
TOLERANT_DOUBT = 1.5
"""DOUBT where there is a tolerance."""
TOLERANT_STALE_DOUBT = 2.0
"""STALE_DOUBT where there is one."""
TOLERANT_FIRST_DOUBT = 2.0
"""FIRST_DOUBT where there is one."""
NUM_SHARES = 8
"""Into which the windows are cut for growing samples."""
ALL_SHARES_GROW = (1, 2, 4)
"""Shares after which candidates are dropped in the first step."""
SAVING = 9.0
"""Naive work / work of this search over both kinds of blocks, as seen on SmolLM2 with 16 steps and more."""


@dataclass(frozen=True)
class Lazy:
    space: SearchSpace
    tolerance: float | None = 0.0
    """Nats of loss that make no difference; None for one standard error of the difference between a candidate and the
    best one over all windows."""

    def run(self, oracle: Oracle) -> Found:
        base, last = oracle.dense, None
        shares = _shares(oracle.groups)
        drift = Drift(self.space, [len(share) for share in oracle.groups], base.num_targets)
        steps: list[Step] = []
        while candidates := self.space.candidates(base.mask):
            # Each step begins with another share, so that over the steps all windows are seen.
            turn = len(steps) * (3 if len(shares) % 3 else 1) % len(shares)
            race = _Race(self, oracle, drift, candidates, base, [*shares[turn:], *shares[:turn]])
            if last is None:
                race.begin()
            else:
                drift.advance(last)
                race.go_on()
            if not race.finite:  # those that were in the race failed: then greedy would look at all
                race.score_all()
            chosen = [candidate for candidate in candidates if candidate.block in race.exact]
            scores = [race.exact[candidate.block] for candidate in chosen]
            best = self.space.best(chosen, scores, base)
            if scores[best].value > self.space.max_value:
                break
            step = Step(
                block=chosen[best].block,
                score=scores[best],
                candidates=candidates,
                scores=scores,
                estimates=race.estimates(),
            )
            base, last = step.score, step.block
            drift.forget(last)
            steps.append(step)
            oracle.removed(step)
        return Found.by(steps)

    def flops_left(self, mask: Mask, num_tokens: int) -> float:
        naive = 2 * self.space.greedy_flops_left(mask, num_tokens)  # which takes half a forward for a candidate
        return naive / SAVING


class _Race:
    """One step: who is scored on how many windows."""

    def __init__(
        self,
        strategy: Lazy,
        oracle: Oracle,
        drift: Drift,
        candidates: Sequence[Candidate],
        base: Score,
        shares: Sequence[Sequence[range]],
    ) -> None:
        self._strategy = strategy
        self._oracle = oracle
        self._drift = drift
        self._base = base
        self._shares = shares
        self._candidates = {candidate.block: candidate for candidate in candidates}
        self.exact: dict[Block, Score] = {}
        self._sums: dict[Block, dict[int, float]] = {}

    def begin(self) -> None:
        """The first step: all candidates on one share, the better ones on more, those that are left in full."""
        tolerance = self._strategy.tolerance
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
        """A later step."""
        # Of those that failed before nothing is known, and they may not fail now.
        failed = [block for block in self._candidates if not self._drift.is_finite(block)]
        order = sorted((block for block in self._candidates if block not in failed), key=self._drift.estimate)
        if self._strategy.tolerance == 0:
            self._compare_all(failed, order)
        else:
            self._sample(failed, 0, len(self._shares))
            self._settle_for_one(order)

    def _settle_for_one(self, order: Sequence[Block]) -> None:
        """Whoever may be better than the best one by more than the tolerance races it; the winner is scored in full."""
        doubt, number = TOLERANT_STALE_DOUBT, 0
        racing = list(order)
        while racing := [block for block in racing if self._drift.is_finite(block)]:
            best = min(racing, key=self._drift.estimate)
            racing.remove(best)
            racing = [best, *self._drift.rivals(racing, best, doubt, self._strategy.tolerance)]
            if len(racing) == 1 or number == len(self._shares):
                self._sample([best], number, len(self._shares))
                return
            self._sample(racing, number, number + 1)
            doubt, number = TOLERANT_DOUBT, number + 1

    def _compare_all(self, failed: Sequence[Block], order: Sequence[Block]) -> None:
        """The likely leaders in full, then whoever may be better."""
        leaders = [*failed, *order[:1]]
        if order:
            leaders += self._drift.rivals(order[1:LEADERS], order[0], DOUBT, self._strategy.tolerance)
        self._sample(leaders, 0, len(self._shares))
        rest = [block for block in order if block not in leaders]
        for number in range(len(self._shares)):
            if self.finite:
                best = min(self.finite, key=self._drift.estimate)
                doubt = DOUBT if number else STALE_DOUBT
                rest = self._drift.rivals(rest, best, doubt, self._strategy.tolerance)
            if not rest:
                return
            self._sample(rest, number, number + 1)
            rest = [block for block in rest if self._drift.is_finite(block)]

    @property
    def finite(self) -> list[Block]:
        """Those that have a finite score over all windows."""
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
        """Score candidates on some shares of the windows."""
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
    """Nearly equal parts of the windows' groups, in their order."""
    number = min(NUM_SHARES, len(groups))
    return [list(groups[first:stop]) for first, stop in cut(len(groups), number)]
