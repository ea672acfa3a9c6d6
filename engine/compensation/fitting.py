"""Fit the stages of a model one after the other: sums from replicas, added in a fixed order, and solved here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.compensation.method import Method
from blockpruner.engine.compensation.projections import Weights
from blockpruner.engine.compensation.replica import Fitted, LossUnit, StageSums, SumsUnit
from blockpruner.engine.compensation.stages import FittedStage
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import cut

NUM_PARTS = 8
"""Parts of the text whose sums are added. A fixed number, so that the result has the same bits for any number of
replicas; also the largest number of replicas that work at the same time."""


@dataclass(frozen=True)
class Trial:
    """One way to fit, of several that are compared."""

    method: Method
    ridge: float

    def __str__(self) -> str:
        return f"{self.method.name} with ridge {self.ridge:g}"


@dataclass(frozen=True)
class Cost:
    """Approximate FLOPs of units, by which replicas that hang are told from slow ones."""

    forward: float
    """Of one window through the whole model."""
    sums: float
    """Of the sums of one stage over one window and one stream."""

    @classmethod
    def of(cls, shape: ModelShape, widest: int, seq_len: int) -> Cost:
        """widest: largest input size of a projection."""
        return cls(shape.forward_flops(Mask(), seq_len), 2.0 * seq_len * widest * (widest + shape.hidden_size))


NO_COST = Cost(0.0, 0.0)
"""For a single replica in this process, which nobody watches."""


@dataclass(frozen=True)
class Fitting:
    """Fits the weights of some trials."""

    scorer: Scorer
    stages: Sequence[FittedStage]
    weights: Mapping[Block, Weights]
    """The dense model's weights of all projections to fit, in the dtype in which they will be written."""
    trials: Sequence[Trial]
    parts: Sequence[tuple[int, int]]
    """The parts of the text to fit on: the first window of each, and one past its last one."""
    cost: Cost
    run: int = 0
    """Number of this fit, if the same replicas work on several, one after the other."""

    def fit(self, known: Mapping[int, Sequence[Changed]]) -> Iterator[tuple[FittedStage, Sequence[Changed]]]:
        """Yield each stage that some trial fits, with the changed weights of each trial. known: stages that were fitted
        before."""
        fitted: dict[int, Sequence[Changed]] = {}
        for stage in self.to_fit:
            if stage.number in known:
                changes = known[stage.number]
            else:
                sums = self._sums(stage, fitted)
                changes = [self._changed(stage, number, sums) for number in range(len(self.trials))]
            fitted[stage.number] = [changes[number] for number in self._with_stream]
            yield stage, changes

    @property
    def to_fit(self) -> list[FittedStage]:
        return [stage for stage in self.stages if any(trial.method.fits(stage) for trial in self.trials)]

    @cached_property
    def _with_stream(self) -> list[int]:
        """The trials that need a pruned stream of their own."""
        return [number for number, trial in enumerate(self.trials) if trial.method.needs_own]

    def losses(self, changed: Changed, name: str, windows: Sequence[tuple[int, int]]) -> list[float]:
        """Return the summed token losses, in nats, of each window of some ranges."""
        units = [LossUnit(first, stop, changed, name, (stop - first) * self.cost.forward) for first, stop in windows]
        found = dict(self._results(units))
        return [loss for unit in units for loss in found[unit.first]]

    def _sums(self, stage: FittedStage, fitted: Fitted) -> StageSums:
        """Sum over all parts. The order of the sum is that of the parts, whenever they arrive."""
        last = max(fitted, default=None)
        recent = {} if last is None else {last: fitted[last]}
        of_dense = any(trial.method.needs_dense for trial in self.trials)

        def unit(first: int, stop: int, *, is_whole: bool) -> SumsUnit:
            start = 0 if is_whole or last is None else last
            share = (stage.number - start + 1) / (self.stages[-1].number + 1)
            streams = 1 + len(self._with_stream)
            flops = (stop - first) * streams * (2 * share * self.cost.forward + self.cost.sums)
            needed = fitted if is_whole else recent
            return SumsUnit(
                first=first,
                stop=stop,
                stage=stage.number,
                of_dense=of_dense,
                num_streams=len(self._with_stream),
                fitted=needed,
                is_whole=is_whole,
                run=self.run,
                flops=flops,
            )

        waiting: dict[int, StageSums] = {}
        total: StageSums | None = None
        order = [first for first, _ in self.parts]
        units = [unit(*part, is_whole=False) for part in self.parts]
        while units:
            again = []
            for first, sums in self._results(units):
                if sums is None:  # a replica without the streams of this part
                    again.append(unit(first, dict(self.parts)[first], is_whole=True))
                    continue
                waiting[first] = sums
                while order and order[0] in waiting:
                    part = waiting.pop(order.pop(0))
                    total = part if total is None else total + part
            units = again
        assert total is not None
        return total

    def _results(self, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for result in self.scorer.run(units):
            if isinstance(result, OutOfMemory):
                raise SearchFailed(f"the device does not have enough memory for {result.unit}: {result.reason}")
            yield result.unit.first, result.value

    def _changed(self, stage: FittedStage, number: int, sums: StageSums) -> dict[Block, Weights]:
        trial = self.trials[number]
        if not trial.method.fits(stage):
            return {}
        change = trial.method.change(
            sums.dense if trial.method.needs_dense else None,
            sums.pruned[self._with_stream.index(number)] if trial.method.needs_own else None,
            ridge=trial.ridge,
            num_free=stage.num_free,
        )
        return split(change, stage, self.weights)


def split(change: Tensor, stage: FittedStage, weights: Mapping[Block, Weights]) -> dict[Block, Weights]:
    """Add the change of a stage's weights [H, D] (and biases) to those of its projections, rounded once."""
    changed: dict[Block, Weights] = {}
    start, free = 0, change[:, sum(stage.widths) :]
    for block, width, scale, is_transposed in zip(
        stage.blocks, stage.widths, stage.scales, stage.are_transposed, strict=True
    ):
        before = weights[block]
        part = change[:, start : start + width]
        start += width
        weight = (before.weight.double() + (part.T if is_transposed else part)).to(before.weight.dtype)
        bias = before.bias
        if bias is not None and free.shape[1]:
            bias = (bias.double() + free[:, 0] / scale).to(bias.dtype)
            free = free[:, :0]  # one bias absorbs it
        changed[block] = Weights(weight, bias)
    return changed


def fit_flops(shape: ModelShape, widest: int, num_windows: int, seq_len: int) -> float:
    """Approximate FLOPs of a fit of all blocks with one pruned stream: three forwards, since a pruned block runs before
    and after it is fitted, and the sums of both streams. An attention has an output projection of the hidden size."""
    hidden = shape.hidden_size
    sums = 2.0 * shape.num_layers * (widest * (widest + hidden) + hidden * 2 * hidden)
    return num_windows * (3 * shape.forward_flops(Mask(), seq_len) + 2 * seq_len * sums)


def parts_of(num_windows: int) -> list[tuple[int, int]]:
    """Cut the windows into parts, as (first, stop)."""
    return cut(num_windows, min(NUM_PARTS, num_windows))
