"""What a search is told, and what must agree when it is resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from engine.blocks import Granularity
from engine.errors import UserError
from engine.loading import ModelSource
from engine.search.budget import Budget

FREE_ON_RESUME = {
    "replicas",
    "address",
    "no_ray",
    "placement",
    "gpus_per_replica",
    "task_timeout_s",
    "resource_timeout_s",
}
"""Where the work is done does not change its result."""
BUDGET = {"num_remove", "ratio"}
"""May grow on resume."""


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
    metric: str = "ppl"
    dtype: str = "auto"
    device: str = "auto"
    replicas: int | None = None
    """Copies of the model that score side by side; None: what the devices hold."""
    placement: str = "auto"
    """resident, streamed or sharded; auto: from the model's size and the device's memory."""
    gpus_per_replica: int | None = None
    """None: one on a GPU, none on a CPU. More than one: the model's layers are split over them."""
    threads_per_replica: int | None = None
    """CPU threads of one replica; None: chosen from the machine."""
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
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"expected {_option(name)} of at least {least}, got {value}.")
        self.budget  # noqa: B018 - refuses what no model can meet
        if self.no_ray and (self.address is not None or (self.replicas or 1) > 1):
            raise UserError("expected --no-ray alone: one process holds one replica; drop --replicas and --address.")

    @property
    def source(self) -> ModelSource:
        return ModelSource(self.model, self.revision, self.trust_remote_code)

    @property
    def budget(self) -> Budget:
        return Budget(num_remove=self.num_remove, ratio=self.ratio)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """What keeps a run with the `recorded` config from being resumed with this one."""
        mine = self.to_json()
        return [
            f"{_option(field.name)} was {recorded.get(field.name)!r}, now {mine[field.name]!r}"
            for field in fields(self)
            if field.name not in FREE_ON_RESUME | BUDGET and mine[field.name] != recorded.get(field.name, field.default)
        ]


def _option(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
