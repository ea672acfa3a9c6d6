"""The options of a search, and which of them must stay the same when it is resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from blockpruner.cluster.options import Placing, Replicas
from blockpruner.engine.blocks import Block, Kind, Units
from blockpruner.engine.compensation.config import InSearch
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.options import different, listed
from blockpruner.engine.search.budget import Budget, Limits, Per
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.sections import Bos, Calibration, Model, Precision
from blockpruner.engine.strategies.greedy import Greedy
from blockpruner.engine.text.files import are_same_texts, one_or_all
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.times import BlockTimes, TimeOf

FREE_ON_RESUME = frozenset(
    {
        "replicas", "address", "no_ray", "placement", "gpus_per_replica", "task_timeout_s", "resource_timeout_s",
        "audit", "times",
    }
)  # fmt: skip
"""Options that may change on resume: they decide where the work runs, come after the search (audit), or name a file
whose content is recorded (times)."""
BUDGET = frozenset({"num_remove", "ratio", "budget_ms", "max_perplexity"})
"""Options that may grow on resume, if the strategy can continue a search."""
OLD = {"bos": Bos.FIRST_WINDOW}
"""Options of runs that were recorded before the options existed."""
OLD_NAMES = {"time_of": "time_for"}
"""Options that had another name when runs were recorded."""
FEW_TOKENS = 32
"""New tokens of a measured generation, if the time of a token or of the prompt is what counts."""
NOT_FOR_ALL = ("units", "per", "max_perplexity", "audit", "compensate")
"""Options that some strategies would ignore. Those strategies reject them."""


class SearchConfig(Replicas, Placing, Precision, InSearch, Limits, Budget, Calibration, Model):
    strategy: Strategy = Greedy()
    """How to search for the blocks to remove."""
    metric: Metric = PPL
    """How to score a model with some blocks removed."""
    audit: int | None = Field(default=None, ge=1)
    """Repeat N random steps exhaustively, and report whether greedy search would have removed the same blocks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in NOT_FOR_ALL:
            if getattr(self, name) != type(self).model_fields[name].default and name not in self.strategy.heeds:
                heeding = [f"`strategy={one.name}`" for one in Strategy.all().values() if name in one.heeds]
                raise UserError(f"expected `{name}` with {listed(heeding)}, got `strategy={self.strategy.name}`.")
        if self.max_perplexity is not None and self.metric.needs_dense:
            raise UserError(f"expected `max_perplexity` with `metric=ppl`, got `metric={self.metric.name}`.")
        if self.compensate and self.metric.needs_dense:
            raise UserError(f"expected `compensate` with `metric=ppl`, got `metric={self.metric.name}`.")
        if self.compensate and self.units is not Units.BLOCKS:
            raise UserError(
                f"expected `units=blocks` with `compensate` in a search, got `units={self.units}`; compensate the "
                f"pruned model instead (`blockpruner compensate`)."
            )
        measuring = {"batch": self.batch is not None, "context": self.context is not None}
        timed = {"times": self.times is not None, "time_for": self.time_for is not TimeOf.DECODE, **measuring}
        if not self.needs_times and (option := next((name for name, is_given in timed.items() if is_given), None)):
            raise UserError(f"expected `{option}` with `budget_ms` or `per=ms`.")
        if self.times is not None and (option := next((name for name in measuring if measuring[name]), None)):
            raise UserError(f"expected `{option}` without `times`, whose table says for what it was measured.")
        if self.needs_times and Kind.MHA in self.units.cut:
            raise UserError(
                f"expected `units` blocks or channels with `budget_ms` and `per=ms`, since the times of narrower "
                f"attentions are not measured, got `units={self.units}`."
            )
        if self.audit is not None and self.num_remove is not None and self.audit > self.num_remove:
            raise UserError(f"expected `audit` from 1 to {self.num_remove} (the steps), got {self.audit}.")
        return self

    @property
    def needs_times(self) -> bool:
        return self.budget_ms is not None or self.per is Per.MS

    @property
    def measures_times(self) -> bool:
        """Whether a new run measures what blocks cost."""
        return self.needs_times and self.times is None

    @property
    def workload(self) -> Workload:
        """What is generated to measure times. Every new token costs about the same, so a few are enough unless a whole
        generation counts."""
        few = None if self.time_for is TimeOf.BOTH else FEW_TOKENS
        given = {"batch_size": self.batch, "prompt_len": self.context, "num_tokens": few}
        return Workload.of(**{name: value for name, value in given.items() if value is not None})

    def space(self, shape: ModelShape, times: BlockTimes | None = None) -> SearchSpace:
        """Return the search space for a model of this shape. times: what its blocks cost, if that matters. While they
        are not known, the space is that of one removal, which shows whether the other options suit the model.

        Raises UserError if it is too small for the budget or does not suit the strategy.
        """
        unknown = times is None
        space = SearchSpace(
            shape=shape,
            blocks=self.blocks,
            budget=Budget(num_remove=1) if unknown and self.budget_ms is not None else self.budget,
            keep=frozenset(part for block in self.keep for part in Block.parse(block).parts),
            max_mha=self.max_mha,
            max_mlp=self.max_mlp,
            mixers=self.mixers,
            units=self.units,
            per=Per.BLOCK if unknown and self.per is Per.MS else self.per,
            times=times,
            max_value=math.inf if self.max_perplexity is None else math.log(self.max_perplexity),
        )
        self.strategy.check(space)
        return space

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> Self:
        """Restore a config from the output of `to_json`, also from an earlier version with fewer or other options.

        Raises UserError if it uses an option that no longer exists.
        """
        recorded = {OLD_NAMES.get(name, name): value for name, value in recorded.items()}
        names = {*cls.model_fields, *(name for kind in cls.choice_fields().values() for name in kind.option_names())}
        if gone := [name for name, value in recorded.items() if name not in names and value not in (None, False)]:
            raise UserError(
                f"the run was made with {listed(gone)}, which this version of blockpruner does not have; use the "
                f"version that made it."
            )
        known = {name: value for name, value in recorded.items() if name in names and value is not None}
        return cls.of(**{**OLD, **known})

    def resumed(self, recorded: Mapping[str, Any]) -> Self:
        """Return this config with the recorded choice where this one leaves it open: windows stay what they were, and
        so does that for which times were measured."""
        began = type(self).from_json(recorded)
        chosen: dict[str, Any] = {"bos": began.bos} if self.bos is Bos.AUTO else {}
        if self.measures_times:
            chosen |= {name: getattr(began, name) for name in ("batch", "context") if getattr(self, name) is None}
        return self.replace(**chosen)

    def differences(self, recorded: Mapping[str, Any]) -> str:
        """Describe what prevents resuming a run of the `recorded` config with this one; empty if nothing does.

        Names of the model are not compared, since one model can have several: `header.check_config` compares models.
        """
        free = FREE_ON_RESUME | {"model"} | (BUDGET if self.strategy.grows else frozenset())
        theirs, mine = type(self).from_json(recorded).to_json(), self.resumed(recorded).to_json()
        if are_same_texts(self.calibration, theirs["calibration"]):
            free |= {"calibration"}
        if not self.measures_times:  # a table says for what it was measured, and tables are compared by themselves
            free |= {"batch", "context"}
        for values in (theirs, mine):  # as they are given and recorded
            values["calibration"] = one_or_all(values["calibration"])
        return different(theirs, {name: value for name, value in mine.items() if name not in free})
