"""Fits in several ways, and chooses the one that does best on windows that no fit saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockpruner.engine.blocks import Block
from blockpruner.engine.calibration import Windows
from blockpruner.engine.compensation.config import RIDGES, Fit
from blockpruner.engine.compensation.fitting import Cost, Fitting, Trial, parts_of
from blockpruner.engine.compensation.projections import Weights
from blockpruner.engine.compensation.replica import StagesUnit
from blockpruner.engine.compensation.stages import FittedStage
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.errors import UserError
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer
from blockpruner.engine.text.files import recorded_name
from blockpruner.showing.console import Reporter

HELD_OUT_EVERY = 8
"""One of so many calibration windows is held out, to choose by."""
PRUNED = "pruned"
"""Name of the unchanged pruned model among the losses."""
Known = Mapping[int, Sequence[Changed]]


@dataclass(frozen=True)
class Found:
    """The trial that does best on the held-out windows."""

    trial: Trial | None
    """None: each one makes them worse, so nothing is changed."""
    changed: Changed
    stages: Sequence[FittedStage]
    nlls: dict[str, float | None]
    """Mean token NLL on the held-out windows, by the trial's name, and that of the pruned model."""
    num_tokens: int
    """Tokens that were fitted on."""
    not_fitted: dict[str, str]
    """Kept blocks that cannot be fitted, with the reasons."""

    def to_json(self, windows: Windows) -> dict[str, Any]:
        """Return what blockpruner.json records."""
        made_of = windows.made_of
        return {
            "method": self.trial.method.name if self.trial else None,
            "ridge": self.trial.ridge if self.trial else None,
            "num_tokens": self.num_tokens,
            "calibration": None if made_of is None else recorded_name(made_of.calibration),
            "fingerprint": windows.fingerprint,
            "nll": self.nlls,
            "changed": [block.to_json() for block in sorted(self.changed, key=lambda block: block.depth)],
            "not_fitted": self.not_fitted,
        }

    @property
    def told(self) -> str:
        before = _shown(self.nlls[PRUNED])
        if self.trial is None:
            return f"nothing is changed, since no fit lowers the held-out loss ({before} nats)"
        return f"{self.trial}; held-out loss {before} nats before, {_shown(self.nlls[str(self.trial)])} after"


@dataclass(frozen=True)
class Store:
    """Where fitted stages are kept, so that a fit can be resumed."""

    known: Callable[[int], Known]
    """Return the stages that were fitted before, of one of the fits."""
    save: Callable[[int, int, Sequence[Changed]], None]
    """Keep one stage of one fit."""


NOWHERE = Store(lambda run: {}, lambda run, stage, changes: None)


@dataclass(frozen=True)
class Split:
    """Token ids [num_windows, seq_len] of calibration windows."""

    fitted_on: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, windows: Windows) -> Split:
        """Hold out the same number of windows of each text, spread evenly.

        Raises UserError if there are too few windows.
        """
        num_texts = 1 if windows.made_of is None else len(windows.made_of.calibration)  # they take turns
        if windows.num_windows < 2 * num_texts:
            raise UserError(
                f"expected at least 2 windows of each calibration text, one to fit on and one to choose by, got "
                f"{windows.num_windows} in all; raise `num_samples`, or lower `seq_len`."
            )
        turns = torch.arange(windows.num_windows) // num_texts
        every = min(HELD_OUT_EVERY, int(turns[-1]) + 1)
        is_held_out = turns % every == every // 2
        return cls(windows.tokens[~is_held_out], windows.tokens[is_held_out])

    @property
    def both(self) -> Tensor:
        return torch.cat([self.fitted_on, self.held_out])


def _stages_to_fit(scorer: Scorer, reporter: Reporter) -> tuple[list[FittedStage], dict[Block, str]]:
    """Return the stages to fit, and the blocks that cannot be, with the reasons, which are told."""
    (result,) = scorer.run([StagesUnit()])
    assert not isinstance(result, OutOfMemory)
    stages, reasons = result.value
    told: dict[str, list[str]] = {}
    for block, reason in reasons.items():
        told.setdefault(reason, []).append(str(block))
    for reason, blocks in told.items():
        reporter.say(f"note: {', '.join(blocks)} cannot be fitted: {reason}")
    return stages, reasons


def fit_and_choose(
    fit: Fit,
    scorer: Scorer,
    weights_of: Callable[[Sequence[FittedStage]], Mapping[Block, Weights]],
    split: Split,
    cost: Cost,
    reporter: Reporter,
    store: Store = NOWHERE,
) -> Found:
    """Fit in the ways that `fit` asks for, and choose the one with the lowest loss on held-out windows, or none.

    scorer: its replicas hold the windows of `split.both`. weights_of: returns the weights of the projections to fit.

    Unless a ridge is given, the first method is fitted with several, and the others with the one that did best.
    """

    def nll(changed: Changed, name: str) -> float:
        value = math.fsum(fitting.losses(changed, name, held_out)) / num_predicted
        reporter.say(f"held-out loss, {name}: {value:.4f} nats")
        return value

    stages, reasons = _stages_to_fit(scorer, reporter)
    num_fitted, num_held_out = len(split.fitted_on), len(split.held_out)
    fitting = Fitting(scorer, stages, weights_of(stages), (), parts_of(num_fitted), cost)
    held_out = [(num_fitted + first, num_fitted + stop) for first, stop in parts_of(num_held_out)]
    num_predicted = split.held_out.numel() - num_held_out
    nlls = {PRUNED: nll({}, PRUNED)}
    best: tuple[float, Trial | None, Changed] = (nlls[PRUNED], None, {})
    ridges = RIDGES if fit.ridge is None else (fit.ridge,)
    for run, method in enumerate(fit.method.candidates):
        trials = [Trial(method, ridge) for ridge in ridges]
        one = replace(fitting, trials=trials, run=run)
        changes = _fitted(one, reporter, store)
        losses = [nll(changed, str(trial)) for trial, changed in zip(trials, changes, strict=True)]
        nlls |= {str(trial): loss for trial, loss in zip(trials, losses, strict=True)}
        finite = [(loss, number) for number, loss in enumerate(losses) if math.isfinite(loss)]
        if finite:
            loss, number = min(finite)
            ridges = (trials[number].ridge,)
            if loss < best[0] or not math.isfinite(best[0]):
                best = (loss, trials[number], changes[number])
    shown = {name: value if math.isfinite(value) else None for name, value in nlls.items()}
    not_fitted = {str(block): reason for block, reason in reasons.items()}
    return Found(best[1], best[2], stages, shown, split.fitted_on.numel(), not_fitted)


def _fitted(fitting: Fitting, reporter: Reporter, store: Store) -> list[Changed]:
    """Return the weights of each trial."""
    known = store.known(fitting.run)
    changes: list[dict[Block, Weights]] = [{} for _ in fitting.trials]
    name = fitting.trials[0].method.name
    if known:
        reporter.say(f"resuming {name} after {len(known)} of {len(fitting.to_fit)} stages")
    with reporter.bar(f"fitting: {name}", len(fitting.to_fit) - len(known)):
        for stage, fitted in fitting.fit(known):
            for all_, some in zip(changes, fitted, strict=True):
                all_ |= some
            if stage.number in known:
                continue
            store.save(fitting.run, stage.number, fitted)
            reporter.advance(1)
            if not reporter.console.is_terminal:
                reporter.say(f"{name}: {' and '.join(map(str, stage.blocks))} fitted, ETA {reporter.eta}")
    return list(changes)


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
