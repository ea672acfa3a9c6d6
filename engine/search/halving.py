"""Successive halving: score many masks on few windows, the better ones on more windows, the best ones on all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from blockpruner.engine.blocks import Mask
from blockpruner.engine.score import Score
from blockpruner.engine.search.oracle import Oracle

STAGES = ((0.25, 0.25), (0.5, 0.5))
"""(share of the windows scored so far, share of the masks that are kept)."""


def best_of(oracle: Oracle, masks: Sequence[Mask], number: int, turn: int = 0) -> list[Score]:
    """Return the scores of about the `number` best masks, best first; ties keep the order of `masks`.

    At least one mask is scored on all windows. Masks are compared only on the same windows, so easy windows favour
    none. turn: index of the group of windows to start with; vary it so that a search over many rounds does not fit
    itself to the first windows.
    """
    groups = list(oracle.groups)
    groups = [*groups[turn % len(groups) :], *groups[: turn % len(groups)]]
    sums: dict[Mask, dict[int, float]] = {mask: {} for mask in masks}
    staying, done, num_targets = list(dict.fromkeys(masks)), 0, 0
    for windows_share, masks_share in (*STAGES, (1.0, 0.0)):
        stop = max(1, round(windows_share * len(groups)))
        if stop > done and (windows_share == 1.0 or len(staying) > number):
            for mask, score in zip(staying, oracle.score(staying, groups[done:stop]), strict=True):
                windows = [window for group in groups[done:stop] for window in group]
                sums[mask].update(zip(windows, score.window_sums, strict=True))
                num_targets = score.num_targets
            done = stop
        if windows_share < 1.0 and done:
            finite = [mask for mask in staying if math.isfinite(_total(sums[mask]))]
            finite.sort(key=lambda mask: _total(sums[mask]))
            staying = finite[: max(number, math.ceil(masks_share * len(finite)))]
    scores = [Score(mask, tuple(sums[mask][window] for window in sorted(sums[mask])), num_targets) for mask in staying]
    finite_scores = [score for score in scores if math.isfinite(score.value)]
    return sorted(finite_scores, key=lambda score: score.value)[:number]


def _total(sums: dict[int, float]) -> float:
    return math.fsum(sums.values())
