"""What run.json holds. The format is a contract: programs of others read it."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Loss(TypedDict):
    nll: float | None
    """Mean token NLL in nats; None where another metric was used, or where it is not finite."""
    perplexity: float | None


class StepSummary(Loss):
    """A removal. With a metric other than `ppl`, its value stands under the metric's own key."""

    step: int
    block: list[str | int]
    ratio: float
    num_candidates: int
    num_scored: int
    num_exact: NotRequired[int]
    work_flops: int
    naive_work_flops: int
    wall_s: float


class CalibrationSummary(TypedDict):
    num_windows: int
    num_tokens: int
    fingerprint: str


class Totals(TypedDict):
    work_flops: int
    naive_work_flops: int
    wall_s: float


class RunSummary(TypedDict):
    status: str
    """running, finished or stopped."""
    model: str
    config: dict[str, Any]
    """As `SearchConfig.to_json` gives it."""
    versions: dict[str, str]
    dtype: str
    device: str
    kernel: dict[str, Any]
    """As `KernelShape.to_json` gives it."""
    calibration: CalibrationSummary
    placement: str
    num_replicas: int | None
    num_parameters: int
    num_layers: int
    dense: Loss | None
    steps: list[StepSummary]
    rounds: NotRequired[list[dict[str, Any]]]
    audit: NotRequired[dict[str, Any]]
    totals: Totals
