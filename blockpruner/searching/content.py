"""What run.json holds. The format is a contract: programs of others read it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, with_config
from typing_extensions import TypedDict

from blockpruner.engine.json_files import BlockPair, Count, Size, misfit
from blockpruner.engine.work.times_file import Costs


class RecordedConfig(TypedDict):
    """The options that are read from a record without making a `SearchConfig` of it."""

    model: str
    revision: NotRequired[str | None]
    calibration: str | list[str]
    num_samples: Size
    seq_len: Size
    seed: int


def _check_config(config: dict[str, Any]) -> dict[str, Any]:
    if wrong := misfit(config, RecordedConfig):
        raise ValueError(f"config: {wrong}")
    return config


Config = Annotated[dict[str, Any], AfterValidator(_check_config)]
"""As `SearchConfig.to_json` gives it."""


class Loss(TypedDict):
    nll: float | None
    """Mean token NLL in nats; None where another metric was used, or where it is not finite."""
    perplexity: float | None


class StepSummary(Loss):
    """A removal. With a metric other than `ppl`, its value stands under the metric's own key."""

    step: Count
    block: BlockPair
    ratio: float
    num_candidates: Count
    num_scored: Count
    num_exact: NotRequired[Count]
    work_flops: Count
    naive_work_flops: Count
    wall_s: float
    ms: NotRequired[float]
    """What the model is expected to take after the step, by `times`, if that matters."""


@with_config(ConfigDict(extra="allow"))
class ResultStep(Loss):
    """A removal of the mask that was found. With a metric other than `ppl`, its value stands under its own key."""

    block: BlockPair
    ratio: float


class CalibrationSummary(TypedDict):
    num_windows: Size
    num_tokens: Size
    fingerprint: str


class KernelSummary(TypedDict):
    """As `KernelShape.to_json` gives it."""

    rows: Size
    head_tokens: Size
    masks: Size
    windows: Size
    threads: Size
    batch_invariant: NotRequired[bool]


class RefitSummary(Loss):
    """A refit of the blocks that remained after a step."""

    step: Count
    num_tokens: Count
    """Tokens that were fitted on."""
    is_used: bool
    """False: the search went on with the weights that it had."""
    wall_s: float
    """A part of the step's."""


class ChannelsSummary(TypedDict):
    """The order of the channels, in a file beside run.json."""

    digest: str
    num_tokens: Count
    wall_s: float


class Totals(TypedDict):
    work_flops: Count
    naive_work_flops: Count
    wall_s: float


class RoundSummary(Loss, Totals):
    """A round in which whole masks were compared."""

    round: Count
    name: str


class AuditedStep(TypedDict):
    step: Count
    chosen: BlockPair
    best: BlockPair
    regret: float | None


class AuditSummary(Totals):
    num_audited: Size
    num_agreed: Count
    most_misses: float
    """Largest share of misses that is likely."""
    steps: list[AuditedStep]


class RunSummary(TypedDict):
    status: Literal["running", "finished", "stopped"]
    model: str
    """A hub id, `smollm2`, or the absolute path of a folder or file."""
    fingerprint: NotRequired[str | None]
    """Identifies the weights (`engine.model.identity`). Earlier versions did not record it."""
    config: Config
    versions: dict[str, str]
    dtype: str
    device: str
    kernel: KernelSummary
    calibration: CalibrationSummary
    placement: str
    num_replicas: Count | None
    num_parameters: Size
    num_layers: Size
    mixers: NotRequired[list[str]]
    """What mixes the tokens of each layer, unless all have attention. "" for an MLP alone."""
    missing: NotRequired[list[BlockPair]]
    """Blocks that layers with one block do not have, if there are such layers."""
    channels: NotRequired[ChannelsSummary]
    times: NotRequired[Costs]
    """What each block costs in milliseconds (of what `time_for` says), if that matters."""
    times_setting: NotRequired[dict[str, Any]]
    """Device, dtype, threads and workload with which that was measured."""
    dense: Loss | None
    steps: list[StepSummary]
    rounds: NotRequired[list[RoundSummary]]
    refits: NotRequired[list[RefitSummary]]
    audit: NotRequired[AuditSummary]
    totals: Totals
