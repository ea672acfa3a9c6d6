"""Statistics of the lazy search: estimate how much each removal would cost now from what it cost in earlier steps.

For every candidate and window, the increase in loss over the current model is known from the step in which that window
was last scored. The increase has drifted since then. A sample of windows scored now shows by how much, and it does so
far more precisely than the increases of the sample alone: a window's drift varies about three times less than its
increase (for windows of 32 tokens of SmolLM2, a standard deviation of 0.03 nats against 0.09). The estimate is a
one-dimensional Kalman filter: the mean drift of the sample, with its variance, corrects an expected drift with its own
variance.

Units: nats per token. N is the number of windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.score import Score
from blockpruner.engine.search.space import SearchSpace

Array = NDArray[np.float64]

NEAR_SAME, NEAR_OTHER = 4, 3
"""Maximum distance, in half-layers, at which a block of the same (or other) kind is a neighbour of the removed one."""
DRIFT = {
    ("same", True): (0.010, 0.015, 0.05),
    ("same", False): (0.003, 0.004, 0.04),
    ("other", True): (-0.010, 0.020, 0.05),
    ("other", False): (0.000, 0.004, 0.04),
}
"""Expected drift of an increase in one step, by (kind relative to the removed block, is neighbour): the mean, then the
constant part of the standard deviation and the part proportional to the increase. Measured on SmolLM2: removing an
attention block makes the other attention blocks more costly to remove, and the MLPs next to it less costly. After the
removal of a quarter of an MLP, the drifts of 17 other quarters had a standard deviation of 0.0016: groups change, and
change others, by as much less as they are smaller than a block, in the geometric mean."""
INCREASE_SD = 0.09
DRIFT_SD = 0.03
"""Standard deviations of one window of 32 tokens: of its increase, and of its drift after one step."""
AGEING = 0.4
"""Variance that each further step adds to a window's drift, as a share of the variance of the first step."""
NEXT_SHARE, NEXT_SD = 1.0, 0.5
"""What the removal of a block's next group is expected to cost more than that of the group before it, as a
share of that, and its standard deviation: groups go from the least important one on."""
NEXT_CONSTANT_SD = 0.01
"""The part of that standard deviation that does not depend on the cost."""
REFIT_STEPS = 6
"""A refit of the remaining blocks ages the increases of windows as this many further steps: on SmolLM2, the standard
deviation of a window's drift over a step with a refit was 0.032, and 0.017 without (24 candidates of one search)."""
PRIOR_WINDOWS = 16
"""Weight of the variances above when they are pooled with the variance of a sample, in windows."""
PRIOR_SAMPLES = 20
"""Weight of the initial scale of the variances, in samples. The search learns the scale as it goes."""
OUTLIER = 16.0
"""Cap on the variance of a sample, as a multiple of the expected variance, so that no outlier block can dominate."""


@dataclass
class _Known:
    increases: Array
    """[N]: increase of each window; a guess where `seen` is 0."""
    seen: NDArray[np.int64]
    """[N]: the step in which each window was last scored; 0 if never."""
    guess_variance: float
    """Variance of the guess for one window."""
    variance: float = 0.0
    """Variance of the expected mean increase over all windows, before this step's sample."""
    sample: dict[int, float] = field(default_factory=dict)
    """Increases measured in this step, by window."""


class Drift:
    def __init__(self, space: SearchSpace, group_sizes: Sequence[int], num_targets: int) -> None:
        self._space = space
        self._num_windows = sum(group_sizes)
        scale = math.sqrt(31 / num_targets)
        self._increase_variance = (INCREASE_SD * scale) ** 2
        self._drift_variance = (DRIFT_SD * scale) ** 2
        self._window_ratios = [1.0] * PRIOR_SAMPLES
        self._mean_ratios = [1.0] * PRIOR_SAMPLES
        self._window_scale = 1.0
        self._step = 1
        self._known: dict[Block, _Known] = {}
        self._failed: set[Block] = set()

    def observe(self, block: Block, base: Score, windows: Sequence[int], sums: Sequence[float]) -> None:
        """Record a candidate's loss sums over some windows in this step. `base` is the score of the current model."""
        if not all(math.isfinite(value) for value in sums):
            self._failed.add(block)
            self._known.pop(block, None)
            return
        if len(sums) == self._num_windows:
            self._failed.discard(block)
        if block in self._failed:
            return
        if block not in self._known:
            nothing = np.zeros(self._num_windows)
            self._known[block] = _Known(nothing, np.zeros(self._num_windows, dtype=np.int64), self._increase_variance)
        for window, value in zip(windows, sums, strict=True):
            self._known[block].sample[window] = (value - base.window_sums[window]) / base.num_targets

    def is_finite(self, block: Block) -> bool:
        return block not in self._failed

    def increase(self, block: Block) -> float:
        """Best estimate of a candidate's mean increase over all windows."""
        return self._posterior(block)[0] if self.is_finite(block) else math.inf

    def estimate(self, block: Block) -> float:
        """The increase divided by the candidate's weight in the search: per block, or per parameter."""
        return self.increase(block) / self._space.weight(block)

    def rivals(self, blocks: Sequence[Block], best: Block, doubt: float, tolerance: float | None) -> list[Block]:
        """Return the candidates that may beat `best` by more than the tolerance, within `doubt` standard errors."""
        limit = self.estimate(best)
        may_win = []
        for block in blocks:
            mean, variance = self._posterior(block)
            least = mean - doubt * math.sqrt(variance) + self._indifference(block, best, tolerance)
            if least / self._space.weight(block) <= limit:
                may_win.append(block)
        return may_win

    def contenders(self, blocks: Sequence[Block], doubt: float, margin: float, tolerance: float | None) -> list[Block]:
        """Return the candidates to keep in the first step, all scored on the same windows: those that are not worse
        than the best one by more than `doubt` standard errors of their paired difference plus the margin."""
        finite = [block for block in blocks if self.is_finite(block)]
        if not finite:
            return []
        best = self.leader(finite)
        least = self._mean(best) / self._space.weight(best)
        lead = self._sample(best)
        staying = []
        for block in finite:
            differences = self._sample(block) - lead
            variance = _pooled(differences, self._increase_variance)
            error = doubt * math.sqrt(variance * self._unseen(len(differences))) + margin * self._space.part_of_block(
                block
            )
            if tolerance is None:
                error -= math.sqrt(variance / self._num_windows)
            else:
                error -= tolerance
            if (self._mean(block) - error) / self._space.weight(block) <= least or block == best:
                staying.append(block)
        return staying

    def leader(self, blocks: Sequence[Block]) -> Block:
        """Return the best candidate of the first step. All candidates must have been scored on the same windows."""
        return min(blocks, key=lambda block: self._mean(block) / self._space.weight(block))

    def settle(self) -> None:
        """End the first step: guess unscored windows of a candidate from the best candidate that was scored in full."""
        full = [block for block, known in self._known.items() if self._is_full(known) and self.is_finite(block)]
        if not full:
            return
        best = min(full, key=self._mean)
        lead = np.array([self._known[best].sample[window] for window in range(self._num_windows)])
        for block, known in self._known.items():
            if self._is_full(known) or not self.is_finite(block):
                continue
            windows = list(known.sample)
            differences = self._sample(block) - lead[windows]
            known.guess_variance = _pooled(differences, self._increase_variance)
            known.variance = known.guess_variance * self._unseen(len(windows))
            known.increases = lead + differences.mean()
            known.increases[windows] = self._sample(block)
            known.seen[windows] = 1
            known.sample = {}

    def advance(self, removed: Block, *, is_refitted: bool = False) -> None:
        """Move to the next step after a removal: merge this step's samples and add the drift expected from it.

        is_refitted: whether the blocks that remain have been refitted since, by which estimates age faster.
        """
        for block, known in self._known.items():
            if self.is_finite(block):
                self._take_in(known)
        self._step += 1 + (REFIT_STEPS if is_refitted else 0)
        for block, known in self._known.items():
            relation = "same" if block.kind is removed.kind else "other"
            distance = abs(_half_layer(block) - _half_layer(removed))
            near = distance <= (NEAR_SAME if relation == "same" else NEAR_OTHER)
            mean, constant, share = DRIFT[relation, near]
            part = math.sqrt(self._space.part_of_block(block) * self._space.part_of_block(removed))
            known.increases = known.increases + part * mean
            deviation = part * constant + share * max(0.0, float(known.increases.mean()))
            known.variance += deviation**2 * float(np.mean(self._mean_ratios))

    def forget(self, block: Block) -> None:
        self._known.pop(block, None)

    def succeed(self, removed: Block, successor: Block) -> None:
        """Expect of the next group of a block what its last one, which was scored in full, makes likely.
        Call it before `forget`."""
        last = np.array([self._known[removed].sample[window] for window in range(self._num_windows)])
        size = max(0.0, float(last.mean()))
        self._known[successor] = _Known(
            last + NEXT_SHARE * size,
            np.zeros(self._num_windows, dtype=np.int64),
            self._increase_variance,
            variance=(NEXT_SD * size + NEXT_CONSTANT_SD) ** 2,
        )

    def _take_in(self, known: _Known) -> None:
        if not known.sample:
            return
        windows = list(known.sample)
        sample = np.array([known.sample[window] for window in windows])
        drifts = sample - known.increases[windows]
        if (ratio := self._window_ratio(known)) is not None:
            self._window_ratios.append(ratio)
        if known.variance > 0:
            error = self._window_variance(known, windows, scaled=True) * self._unseen(len(windows))
            self._mean_ratios.append(min(OUTLIER, float(drifts.mean()) ** 2 / (known.variance + error)))
        if self._is_full(known):
            known.increases = np.empty(self._num_windows)
            known.variance = 0.0
        else:
            shift, known.variance = self._shift(known)
            known.increases = known.increases + shift
        known.increases[windows] = sample
        known.seen[windows] = self._step
        known.sample = {}

    def _window_ratio(self, known: _Known) -> float | None:
        """Ratio of a sample's variance to the expected variance; None if the sample is too small or has new windows."""
        windows = list(known.sample)
        if len(windows) < 2 or not (known.seen[windows] > 0).all():
            return None
        drifts = np.array([known.sample[window] for window in windows]) - known.increases[windows]
        return min(OUTLIER, float(drifts.var(ddof=1)) / self._window_variance(known, windows, scaled=False))

    def calibrate(self) -> None:
        """Update the scale of the windows' drifts from all samples so far, including those of this step."""
        now = [ratio for known in self._known.values() if (ratio := self._window_ratio(known)) is not None]
        self._window_scale = float(np.mean([*self._window_ratios, *now]))

    def _posterior(self, block: Block) -> tuple[float, float]:
        """Mean increase over all windows, and its variance."""
        known = self._known[block]
        if self._is_full(known):
            return self._mean(block), 0.0
        before = float(known.increases.mean())
        if not known.sample:
            return before, known.variance
        shift, variance = self._shift(known)
        return before + shift, variance

    def _shift(self, known: _Known) -> tuple[float, float]:
        """Return the correction that the sample makes to the expected mean increase, and the variance that remains."""
        windows = list(known.sample)
        drifts = np.array([known.sample[window] for window in windows]) - known.increases[windows]
        variance = _pooled(drifts, self._window_variance(known, windows, scaled=True))
        error = variance * self._unseen(len(windows))
        gain = known.variance / (known.variance + error)
        return gain * float(drifts.mean()), gain * error

    def _window_variance(self, known: _Known, windows: list[int], *, scaled: bool) -> float:
        """Expected variance of the windows' drifts since they were last scored."""
        ages = self._step - known.seen[windows]
        scale = self._window_scale if scaled else 1.0
        drift = scale * self._drift_variance * (1 + AGEING * (ages - 1))
        return float(np.where(known.seen[windows] > 0, drift, known.guess_variance).mean())

    def _unseen(self, num_seen: int) -> float:
        """Variance of the mean over all windows, divided by the variance of one window, for a sample from a finite
        set."""
        return (1 - num_seen / self._num_windows) / num_seen

    def _indifference(self, block: Block, best: Block, tolerance: float | None) -> float:
        if tolerance is not None:
            return tolerance
        mine, others = (self._latest(self._known[each]) for each in (block, best))
        return float((mine - others).std(ddof=1)) / math.sqrt(self._num_windows) if self._num_windows > 1 else 0.0

    def _latest(self, known: _Known) -> Array:
        latest = known.increases.copy()
        for window, value in known.sample.items():
            latest[window] = value
        return latest

    def _sample(self, block: Block) -> Array:
        return np.array(list(self._known[block].sample.values()))

    def _mean(self, block: Block) -> float:
        return math.fsum(self._known[block].sample.values()) / len(self._known[block].sample)

    def _is_full(self, known: _Known) -> bool:
        return len(known.sample) == self._num_windows


def _pooled(values: Array, expected: float) -> float:
    """Variance of a sample, pooled with the expected variance."""
    degrees = len(values) - 1
    own = float(values.var(ddof=1)) if degrees else 0.0
    return (degrees * own + PRIOR_WINDOWS * expected) / (degrees + PRIOR_WINDOWS)


def _half_layer(block: Block) -> int:
    return 2 * block.layer + (block.kind is Kind.MLP)
