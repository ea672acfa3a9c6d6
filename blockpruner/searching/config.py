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
        if self.needs_times and self.times is None:
            option = "budget_ms" if self.budget_ms is not None else "per=ms"
            raise UserError(f"expected `times` with `{option}`: a table that `blockpruner times` writes.")
        if not self.needs_times and (self.times is not None or self.time_of is not TimeOf.DECODE):
            option = "time_of" if self.times is None else "times"
            raise UserError(f"expected `{option}` with `budget_ms` or `per=ms`.")
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

    def space(self, shape: ModelShape, times: BlockTimes | None = None) -> SearchSpace:
        """Return the search space for a model of this shape. times: what its blocks cost, if that matters.

        Raises UserError if it is too small for the budget or does not suit the strategy.
        """
        space = SearchSpace(
            shape=shape,
            blocks=self.blocks,
            budget=self.budget,
            keep=frozenset(part for block in self.keep for part in Block.parse(block).parts),
            max_mha=self.max_mha,
            max_mlp=self.max_mlp,
            mixers=self.mixers,
            units=self.units,
            per=self.per,
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
        names = {*cls.model_fields, *(name for kind in cls.choice_fields().values() for name in kind.option_names())}
        if gone := [name for name, value in recorded.items() if name not in names and value not in (None, False)]:
            raise UserError(
                f"the run was made with {listed(gone)}, which this version of blockpruner does not have; use the "
                f"version that made it."
            )
        known = {name: value for name, value in recorded.items() if name in names and value is not None}
        return cls.of(**{**OLD, **known})

    def resumed(self, recorded: Mapping[str, Any]) -> Self:
        """Return this config with the recorded choice where this one leaves it open: windows stay what they were."""
        return self.replace(bos=type(self).from_json(recorded).bos) if self.bos is Bos.AUTO else self

    def differences(self, recorded: Mapping[str, Any]) -> str:
        """Describe what prevents resuming a run of the `recorded` config with this one; empty if nothing does.

        Names of the model are not compared, since one model can have several: `header.check_config` compares models.
        """
        free = FREE_ON_RESUME | {"model"} | (BUDGET if self.strategy.grows else frozenset())
        theirs, mine = type(self).from_json(recorded).to_json(), self.resumed(recorded).to_json()
        if are_same_texts(self.calibration, theirs["calibration"]):
            free |= {"calibration"}
        for values in (theirs, mine):  # as they are given and recorded
            values["calibration"] = one_or_all(values["calibration"])
        return different(theirs, {name: value for name, value in mine.items() if name not in free})
