"""The options of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from blockpruner.cluster.options import LocalReplicas
from blockpruner.comparing.method import Method
from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Names, Shares, check_name
from blockpruner.engine.search.budget import check_ratio
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.sections import Calibration, Model, Precision
from blockpruner.engine.strategies.greedy import Greedy
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.searching.config import SearchConfig


class CompareConfig(LocalReplicas, Precision, Calibration, Model):
    methods: Names = Field(
        default=("blockpruner", "slicegpt", "laco-code", "rm", "shortgpt"), examples=["blockpruner,…"]
    )
    """Methods to compare."""
    ratio: Shares = Field(default=(0.2,), examples=["0.2,0.3"])
    """Shares of the parameters to remove. Each method gets as close as it can."""
    strategy: Strategy = Greedy()
    """Strategy for methods that remove one block after the other. It must be able to continue a search."""
    perplexity: tuple[str, ...] = ()
    """Text to measure perplexity on: wikitext2 (its test split), builtin or a file. May be repeated."""
    test_seq_len: int = Field(default=2048, ge=2)
    """Tokens per window of `perplexity`."""
    test_windows: int | None = Field(default=None, ge=1)
    """Use only the first N windows of `perplexity`."""
    tasks: Names = Field(default=(), examples=["piqa,…"])
    """Tasks, groups or tags of lm-eval, as for evaluate."""
    include_path: Path | None = None
    """Folder with additional task files for lm-eval."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N questions of each task."""
    batch_size: int = Field(default=1, ge=1)
    """Task requests per call."""
    repeats: int = Field(default=5, ge=0)
    """Timed generations per model, alternating with the dense model. 0: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.methods or not self.ratio:
            raise UserError("expected `methods` and `ratio` with at least one entry each.")
        for name in self.methods:
            check_name(Method.all(), "methods", name)
        for what, values in (("methods", self.methods), ("ratio", self.ratio)):
            if len(set(values)) < len(values):
                raise UserError(f"expected `{what}` without repetitions, got {','.join(map(str, values))}.")
        for ratio in self.ratio:
            check_ratio(ratio)
        if not self.strategy.grows:
            growing = " or ".join(name for name, one in Strategy.all().items() if one.grows)
            raise UserError(f"expected `strategy` {growing}, got {self.strategy.name!r}.")
        if self.judged:
            self.evaluation()
        if self.test_windows is not None and not self.perplexity:
            raise UserError("expected `test_windows` together with `perplexity`.")
        for name in ("limit", "include_path"):
            if getattr(self, name) is not None and not self.tasks:
                raise UserError(f"expected `{name}` together with `tasks`.")
        return self

    @property
    def judged(self) -> bool:
        """Whether the models will be evaluated."""
        return bool(self.perplexity or self.tasks)

    @property
    def search(self) -> SearchConfig:
        """The options that all methods share, with the largest ratio."""
        shared = {name: getattr(self, name) for name in SearchConfig.model_fields if name in type(self).model_fields}
        return SearchConfig(**{**shared, "ratio": max(self.ratio)})

    def told(self, name: str, num_layers: int) -> SearchConfig:
        """Return the options of a method."""
        return Method.named("methods", name).told(self.search, num_layers)

    def evaluation(self, model: str | None = None) -> EvaluationConfig:
        """Return the options to evaluate the model, or another one such as a checkpoint."""
        shared = {
            name: getattr(self, name) for name in EvaluationConfig.model_fields if name in type(self).model_fields
        }
        own = {"seq_len": (self.test_seq_len,), "num_windows": self.test_windows}
        other = {"model": model, "revision": None} if model else {}
        return EvaluationConfig(**{**shared, **own, **other})

    def same_on_resume(self) -> dict[str, Any]:
        """Return the options that must be equal on resume: those that change the result of a method.

        `bos` and `chat_template` show in the windows."""
        asked = {
            "methods", "ratio", "perplexity", "test_seq_len", "test_windows", "tasks", "include_path", "limit",
            "batch_size", "repeats", "replicas", "bos", "chat_template",
        }  # fmt: skip
        return {name: value for name, value in self.to_json().items() if name not in asked}
