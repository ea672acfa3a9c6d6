"""What a comparison is told."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from blockpruner.comparing.methods import Ranked, Rebuilt, method
from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.work.shape import ModelShape
from blockpruner.evaluating.evaluating import EvaluationConfig
from blockpruner.searching.config import BUDGET, FREE_ON_RESUME, SearchConfig, check_least


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    methods: tuple[str, ...]
    ratio: tuple[float, ...]
    """Shares of the parameters to remove; each method comes as near as it can."""
    search: SearchConfig
    """Model, calibration and replicas for all methods, and whether stepwise searches are greedy or lazy. Its budget and
    granularity stand for nothing."""
    perplexity: tuple[str, ...] = ()
    test_seq_len: int = 2048
    test_windows: int | None = None
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    batch_size: int = 1
    repeats: int = 5
    """Generations that are timed for each model; 0 for none."""

    def __post_init__(self) -> None:
        if not self.methods or not self.ratio:
            raise UserError("expected --methods and --ratio with at least one entry each.")
        for name in self.methods:
            method(name)
        for what, values in (("--methods", self.methods), ("--ratio", self.ratio)):
            if len(set(values)) < len(values):
                raise UserError(f"expected {what} without repetitions, got {','.join(map(str, values))}.")
        for ratio in self.ratio:
            if not 0 < ratio < 1:
                raise UserError(f"expected --ratio between 0 and 1 (exclusive), got {ratio}.")
        if self.search.strategy not in ("greedy", "lazy"):
            raise UserError(f"expected --strategy greedy or lazy, got {self.search.strategy!r}.")
        check_least(self, 0, "repeats")
        check_least(self, 1, "test_seq_len", "test_windows")
        if self.judged:
            self.evaluation(())
        if self.test_windows is not None and not self.perplexity:
            raise UserError("expected --test-windows together with --perplexity.")
        for name in ("limit", "include_path"):
            if getattr(self, name) is not None and not self.tasks:
                raise UserError(f"expected --{name.replace('_', '-')} together with --tasks.")

    @property
    def judged(self) -> bool:
        """Whether the models are to be evaluated."""
        return bool(self.perplexity or self.tasks)

    def search_by(self, name: str, shape: ModelShape) -> SearchConfig:
        """What a method is told: model and calibration, and the budget of those that remove blocks, up to the largest
        ratio."""
        how = method(name).how
        if isinstance(how, Rebuilt):
            return self.search
        common = replace(self.search, ratio=max(self.ratio), num_remove=None)
        if isinstance(how, Ranked):
            return replace(common, blocks=how.blocks, strategy="greedy", tolerance=None)
        keep = ("layer.0", f"layer.{shape.num_layers - 1}") if how.keep_ends else ()
        strategy: dict[str, Any] = {} if how.stepwise else {"strategy": "one-shot", "tolerance": None}
        return replace(common, **{**strategy, **how.options, "keep": keep})

    def evaluation(self, masks: tuple[Mask, ...], model: str | None = None) -> EvaluationConfig:
        """Of the model without the blocks of each mask; or of another, such as a checkpoint."""
        search = self.search
        return EvaluationConfig(
            model=model or search.model, masks=masks if model is None else (), tasks=self.tasks,
            include_path=self.include_path, limit=self.limit, perplexity=self.perplexity,
            text_column=search.text_column, seq_len=(self.test_seq_len,), num_windows=self.test_windows,
            batch_size=self.batch_size, dtype=search.dtype, device=search.device, replicas=search.replicas,
            threads_per_replica=search.threads_per_replica, no_ray=search.no_ray,
            revision=None if model else search.revision, trust_remote_code=search.trust_remote_code,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What must agree when a comparison is resumed: all that methods depend on but what is asked for."""
        free = (FREE_ON_RESUME | BUDGET) - {"no_ray"}  # which decides the threads, and they may change bits
        return {key: value for key, value in self.search.to_json().items() if key not in free}

    def told(self) -> dict[str, Any]:
        """All that it takes to repeat the comparison."""
        mine = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "search"}
        include_path = None if self.include_path is None else str(self.include_path)
        return {**self.search.to_json(), **mine, "include_path": include_path}
