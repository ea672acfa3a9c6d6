"""What a search is told, and what must agree when it is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from blockpruner.engine.blocks import Block, Granularity
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.loading import ModelSource, is_same_model
from blockpruner.engine.search.beam import Beam
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.evolution import Evolution
from blockpruner.engine.search.greedy import Greedy
from blockpruner.engine.search.lazy import Lazy
from blockpruner.engine.search.one_shot import OneShot
from blockpruner.engine.search.oracle import Strategy
from blockpruner.engine.search.refine import Refine
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.shape import ModelShape

FREE_ON_RESUME = {
    "replicas",
    "address",
    "no_ray",
    "placement",
    "gpus_per_replica",
    "task_timeout_s",
    "resource_timeout_s",
    "audit",
}
"""Where the work is done does not change its result."""
BUDGET = {"num_remove", "ratio", "max_perplexity"}
"""May grow on resume, where a search goes one block at a time."""
GROWING = {"greedy", "lazy"}
BY_STRATEGY = {
    "tolerance": ("lazy",),
    "audit": ("lazy",),
    "width": ("beam",),
    "generations": ("evolution",),
    "offspring": ("evolution",),
    "max_perplexity": ("greedy", "lazy", "beam"),
    "per": ("greedy", "lazy", "one-shot"),
}
"""Options that other strategies would not heed, so these are refused there."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    model: str
    """Hub id, checkpoint folder, .gguf file or `smollm2`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    calibration: str = "alpaca"
    """`alpaca`, `wikitext2`, `builtin` or a file."""
    text_column: str = "text"
    num_samples: int = 256
    """Rows drawn from the calibration set."""
    seq_len: int = 2048
    """Tokens of one window."""
    num_windows: int | None = None
    """Keep only the first so many windows."""
    seed: int = 42
    num_remove: int | None = None
    """Blocks to remove (layers, with blocks=layer)."""
    ratio: float | None = None
    """Share of the parameters to remove, instead of num_remove."""
    blocks: Granularity = Granularity.MIX
    strategy: str = "greedy"
    """greedy, lazy, one-shot, beam or evolution."""
    metric: Metric = Metric.PPL
    tolerance: str | None = None
    """Lazy: nats of loss that make no difference, or `1se` for one standard error of a difference; None: 0."""
    audit: int | None = None
    """Lazy: so many random steps are done again exhaustively."""
    width: int | None = None
    """Beam: masks that stay at each level; None: 4, or as many as there are."""
    generations: int | None = None
    """Evolution; None: 50."""
    offspring: int | None = None
    """Evolution: masks of one generation; None: 32."""
    refine: bool = False
    """Exchange blocks after the strategy."""
    per: str = "block"
    """Judge a removal by its increase per `block` or per `params`."""
    max_mha: int | None = None
    """MHA blocks to remove at most."""
    max_mlp: int | None = None
    keep: tuple[str, ...] = ()
    """Blocks that stay, such as mha.0; layer.0 for both blocks of a layer."""
    max_perplexity: float | None = None
    """Stop before a removal after which the calibration perplexity would be higher."""
    dtype: str = "auto"
    device: str = "auto"
    replicas: int | None = None
    """Copies of the model that score side by side; None: what the devices hold."""
    placement: str = "auto"
    """resident, streamed or sharded; auto: from the model's size and the device's memory."""
    gpus_per_replica: int | None = None
    """None: one on a GPU, none on a CPU. More than one: the model's layers are split over them."""
    threads_per_replica: int | None = None
    """CPU threads of one replica; None: 1 on Ray, all in one process."""
    address: str | None = None
    """A Ray cluster to join; None: this machine."""
    no_ray: bool = False
    """One replica in this process."""
    allow_mixed: bool = False
    """Let replicas of different kinds of devices work on one run."""
    task_timeout_s: float = 60.0
    """Seconds after which a unit of work is given up, unless five times what it should take is longer."""
    resource_timeout_s: float = 60.0
    """Seconds to wait while the cluster has no place for any replica."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_samples", 1),
            ("seq_len", 2),
            ("num_windows", 1),
            ("replicas", 1),
            ("gpus_per_replica", 1),
            ("threads_per_replica", 1),
            ("task_timeout_s", 1),
            ("resource_timeout_s", 1),
            ("audit", 1),
            ("width", 1),
            ("generations", 1),
            ("offspring", 1),
            ("max_mha", 0),
            ("max_mlp", 0),
            ("max_perplexity", 1),
        ):
            check_least(self, least, name)
        self.budget  # noqa: B018 - refuses what no model can meet
        for name, strategies in BY_STRATEGY.items():
            default = next(field.default for field in fields(self) if field.name == name)
            if getattr(self, name) != default and self.strategy not in strategies:
                raise UserError(
                    f"expected {_option(name)} with --strategy {' or '.join(strategies)}, got --strategy "
                    f"{self.strategy}."
                )
        if self.max_perplexity is not None and not math.isfinite(self.max_perplexity):
            raise UserError(f"expected --max-perplexity to be a finite number, got {self.max_perplexity}.")
        if self.max_perplexity is not None and self.metric is not Metric.PPL:
            raise UserError(f"expected --max-perplexity with --metric ppl, got --metric {self.metric}.")
        if self.per not in ("block", "params"):
            raise UserError(f"expected --per block or params, got {self.per!r}.")
        if self.audit is not None and self.refine:
            raise UserError("expected --audit without --refine, whose exchanges no greedy search makes.")
        if self.per == "params" and self.refine:
            raise UserError("expected --per params without --refine, which compares whole masks.")
        if self.audit is not None and self.num_remove is not None and self.audit > self.num_remove:
            raise UserError(f"expected --audit from 1 to {self.num_remove} (the steps), got {self.audit}.")
        self._tolerance()
        for block in self.keep:
            Block.parse(block)
        if self.no_ray:
            check_one_process(self.replicas, self.address)

    @property
    def source(self) -> ModelSource:
        return ModelSource(self.model, self.revision, self.trust_remote_code)

    @property
    def budget(self) -> Budget:
        return Budget(num_remove=self.num_remove, ratio=self.ratio)

    def space(self, shape: ModelShape) -> SearchSpace:
        """What may be removed from such a model. Raises UserError if that is too little."""
        return SearchSpace(
            shape=shape,
            blocks=self.blocks,
            budget=self.budget,
            keep=frozenset(part for block in self.keep for part in Block.parse(block).parts),
            max_mha=self.max_mha,
            max_mlp=self.max_mlp,
            per_params=self.per == "params",
            max_value=math.inf if self.max_perplexity is None else math.log(self.max_perplexity),
        )

    def strategy_over(self, space: SearchSpace) -> Strategy:
        strategies: dict[str, Callable[[], Strategy]] = {
            "greedy": lambda: Greedy(space),
            "lazy": lambda: Lazy(space, self._tolerance()),
            "one-shot": lambda: OneShot(space),
            "beam": lambda: Beam(space, self.width),
            "evolution": lambda: Evolution(space, self.generations or 50, self.offspring or 32, self.seed),
        }
        strategy = strategies[self.strategy]()
        return Refine(space, strategy) if self.refine else strategy

    def _tolerance(self) -> float | None:
        """None for one standard error."""
        if self.tolerance == "1se":
            return None
        try:
            tolerance = float(self.tolerance or 0)
        except ValueError:
            tolerance = math.nan
        if not 0 <= tolerance < math.inf:
            raise UserError(f"expected --tolerance in nats, as 0.002, or 1se, got {self.tolerance!r}.")
        return tolerance

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep), "blocks": str(self.blocks), "metric": str(self.metric)}

    @classmethod
    def from_json(cls, recorded: dict[str, Any]) -> SearchConfig:
        """The config that `to_json` gave, or that of an earlier version, which did not know all options."""
        known = {field.name: recorded[field.name] for field in fields(cls) if field.name in recorded}
        typed = {
            "keep": tuple(known.get("keep", ())),
            "blocks": Granularity(known.get("blocks", Granularity.MIX)),
            "metric": Metric(known.get("metric", Metric.PPL)),
        }
        return cls(**{**known, **typed})

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """What keeps a run with the `recorded` config from being resumed with this one."""
        mine = self.to_json()
        free = FREE_ON_RESUME | (BUDGET if self.strategy in GROWING and not self.refine else set())
        # Runs of versions that did not know an option were made without it.
        defaults: dict[str, Any] = {field.name: [] if field.name == "keep" else field.default for field in fields(self)}
        return [
            f"{_option(field.name)} was {recorded.get(field.name)!r}, now {mine[field.name]!r}"
            for field in fields(self)
            if field.name not in free and mine[field.name] != recorded.get(field.name, defaults[field.name])
            if field.name != "model" or not is_same_model(self.model, recorded["model"])
        ]


def check_least(config: object, least: int, *names: str) -> None:
    """Raise UserError if an option that is given is below what it may be. names: of fields, which are options."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"expected {_option(name)} of at least {least}, got {value}.")


def check_one_process(replicas: int | None, address: str | None) -> None:
    """Raise UserError if --no-ray was given with what only Ray can do."""
    if address is not None or (replicas or 1) > 1:
        raise UserError("expected --no-ray alone: one process holds one replica; drop --replicas and --address.")


def _option(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
