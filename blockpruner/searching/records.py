"""The lines of a ledger as frozen values.

Each line belongs to a phase. Phase 0 is the dense model, phases 1, 2, ... are the steps or rounds in their order, and
phase -s is the audit of step s. In the file a phase is called `step`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.json_files import BlockPair, Count, Size, told
from blockpruner.engine.work.times_file import Costs
from blockpruner.engine.work.units import KernelShape
from blockpruner.files import plain
from blockpruner.searching.content import CalibrationSummary, Config, KernelSummary, ResultStep

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that can be NaN or infinite. JSON has no such values, so they are recorded as null."""
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
"""As scores.parquet holds it."""
MaskText = Annotated[str, AfterValidator(lambda text: str(Mask.parse(text)))]
"""A mask as `str(mask)` gives it."""


class Record(BaseModel):
    """One line. The loss of a metric other than perplexity is an extra value under the key of the metric."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="allow")
    type: ClassVar[str]

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Create a record from values by field name. Losses have the form that `Metric.recorded` returns."""
        return cls(**values)

    def to_line(self) -> dict[str, Any]:
        return {"type": self.type, **self.values()}

    def values(self) -> dict[str, Any]:
        """Return the values as plain JSON, in the order of the fields."""
        values: dict[str, Any] = plain(self.model_dump(by_alias=True, exclude_unset=True))
        return values


class RunRecord(Record):
    """The first line: everything that the run depends on."""

    type = "run"
    config: Config
    dtype: str
    device: str
    kernel: KernelSummary
    placement: str
    calibration: CalibrationSummary
    """The windows that are scored."""
    fitted_on: CalibrationSummary | None = None
    """The windows that refits of the search are fitted on."""
    versions: dict[str, str]
    fingerprint: str | None = None
    """Identifies the weights (`engine.model.identity`). Earlier versions did not record it."""
    num_parameters: Count | None = None
    num_layers: Count | None = None
    mixers: list[str] | None = None
    """What mixes the tokens of each layer, unless all have attention. "" for an MLP alone."""
    missing: list[BlockPair] | None = None
    """Blocks that layers with one block do not have, if there are such layers."""
    times: Costs | None = None
    """What each block costs in milliseconds, if that matters."""
    times_setting: dict[str, Any] | None = None
    """Device, dtype, threads and workload with which that was measured. Earlier versions did not record it."""


class KernelRecord(Record):
    """A new kernel shape for the following lines, because a device ran out of memory."""

    type = "kernel"
    rows: Size
    head_tokens: Size
    masks: Size
    windows: Size
    threads: Size
    batch_invariant: bool

    @property
    def kernel(self) -> KernelShape:
        return KernelShape(**{name: getattr(self, name) for name in type(self).model_fields})


class ChannelsRecord(Record):
    """The order of the channels of the MLPs, if groups of them are removed. It is in the file beside the ledger;
    without it, it is computed again."""

    type = "channels"
    digest: str
    """SHA-256 of the order (`engine.channels`)."""
    num_tokens: Count
    """Tokens of the calibration text by which they were ordered; 0: they were ordered by their weights."""
    wall_s: float


class UnitRecord(Record):
    """Loss sums of some masks over some windows, recorded as they arrive."""

    type = "unit"
    phase: Int32 = Field(alias="step")
    masks: list[MaskText]
    first: Count
    stop: Count
    sums: list[list[Number]]
    seconds: float
    wall_s: float
    """Seconds since the previous unit of the phase, or since the phase began in this session."""
    flops: Count
    replica: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        widths = {len(row) for row in self.sums}
        if not self.masks or len(self.sums) != len(self.masks) or widths != {self.stop - self.first}:
            raise ValueError("expected one sum for each mask and window")
        return self


class ScoreRecord(Record):
    """The result of a mask in a phase."""

    __pydantic_extra__: dict[str, float | None]
    type = "score"
    phase: Int32 = Field(alias="step")
    block: Annotated[str, AfterValidator(lambda text: str(Block.parse(text)))] | None
    mask: MaskText
    nll: float | None
    perplexity: float | None
    num_windows: Int32
    exact: bool
    """False for an estimate."""
    seconds: float
    replica: str
    window_sums: Annotated[
        tuple[Number, ...], BeforeValidator(lambda sums: tuple(sums) if isinstance(sums, list) else sums)
    ] = ()
    """Recorded for the dense model only."""


class Spent(Record):
    """The cost of a phase, and the work of the plain loop for the same masks."""

    work_flops: Count
    naive_work_flops: Count
    wall_s: float
    num_replicas: Count | None
    num_lost: Count | None
    placement: str | None


class Outcome(Record):
    """The result of a step or a round."""

    __pydantic_extra__: dict[str, float | None]

    nll: float | None
    perplexity: float | None
    ratio: float
    num_candidates: Count
    num_scored: Count
    num_exact: Count


class _Removed(Record):
    step: Count
    block: BlockPair


class _Judged(Record):
    round: Count
    name: str
    mask: MaskText


class _Audited(Record):
    step: Count
    chosen: BlockPair
    best: BlockPair
    regret: Number


# Pydantic orders the fields by base class, from right to left.
class StepRecord(Spent, Outcome, _Removed):
    """A removal."""

    type = "step"

    @property
    def removed(self) -> Block:
        return Block.from_json(self.block)

    def __str__(self) -> str:
        extra = {key: value for key, value in (self.model_extra or {}).items() if value is not None}
        losses = extra if self.perplexity is None else {"perplexity": self.perplexity}
        told = "".join(f", {name} {value:.4f}" for name, value in losses.items())
        return f"step {self.step}: {self.removed} removed{told}, ratio {self.ratio:.4f}"


class RoundRecord(Spent, Outcome, _Judged):
    """A round in which whole masks were compared."""

    type = "round"


class AuditRecord(Spent, _Audited):
    """A step that was repeated exhaustively."""

    type = "audit"


class ResultRecord(Record):
    """The removals of the mask that was found, if the steps did not lead to it."""

    type = "result"
    steps: Annotated[list[ResultStep], Field(min_length=1)]


class CompensationRecord(Record):
    """A refit after a step. The file that `digest` names holds the weights; without it they are fitted again."""

    type = "compensation"
    step: Count
    """The step after which the blocks were refitted."""
    mask: MaskText
    method: str
    ridge: float
    num_tokens: Count
    """Tokens that were fitted on."""
    digest: str
    """SHA-256 of the weights (`engine.compensation.changed_file`)."""
    is_used: bool
    """False: the search went on with the weights that it had, since these made the model no better."""
    nll: float | None
    perplexity: float | None
    """Of the refitted model."""
    window_sums: Annotated[
        tuple[Number, ...], BeforeValidator(lambda sums: tuple(sums) if isinstance(sums, list) else sums)
    ]
    work_flops: Count
    wall_s: float


PhaseRecord = StepRecord | RoundRecord

RECORDS: dict[str, type[Record]] = {
    record.type: record
    for record in (
        RunRecord, KernelRecord, UnitRecord, ScoreRecord, StepRecord, RoundRecord, ResultRecord, AuditRecord,
        CompensationRecord, ChannelsRecord,
    )
}  # fmt: skip


def record_of(line: dict[str, Any]) -> Record:
    """Restore a record from the output of `to_line`. Raises ValueError with the first wrong place for anything else."""
    kind = line.get("type")
    if not isinstance(kind, str) or kind not in RECORDS:
        raise ValueError(f"{str(kind)[:40]!r} is no type of record")
    try:
        return RECORDS[kind].model_validate({key: value for key, value in line.items() if key != "type"}, strict=True)
    except ValidationError as error:
        raise ValueError(told(error)) from error


class Sums:
    """Loss sums of one phase, by mask and window, collected as they arrive."""

    def __init__(self) -> None:
        self.sums: dict[Mask, dict[int, float]] = {}
        self.seconds: dict[Mask, float] = {}
        self.replicas: dict[Mask, set[str]] = {}

    @classmethod
    def of(cls, units: list[UnitRecord]) -> Self:
        found = cls()
        for unit in units:
            masks = [Mask.parse(mask) for mask in unit.masks]
            found.add(masks, unit.first, unit.stop, unit.sums, unit.seconds, unit.replica)
        return found

    def add(
        self,
        masks: list[Mask] | tuple[Mask, ...],
        first: int,
        stop: int,
        sums: list[list[float]],
        seconds: float,
        replica: str,
    ) -> None:
        for mask, row in zip(masks, sums, strict=True):
            known = self.sums.setdefault(mask, {})
            if not known.keys() >= set(range(first, stop)):  # otherwise another chunking computed it before
                self.seconds[mask] = self.seconds.get(mask, 0.0) + seconds / len(masks)
            known.update(zip(range(first, stop), row, strict=True))
            self.replicas.setdefault(mask, set()).add(replica)

    def has(self, masks: list[Mask] | tuple[Mask, ...], first: int, stop: int) -> bool:
        return all(window in self.sums.get(mask, {}) for mask in masks for window in range(first, stop))
