"""The replica of a search that compensates: one model scores masks, also with fitted weights, and fits them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockpruner.engine.blocks import Mask
from blockpruner.engine.compensation.in_place import InPlace
from blockpruner.engine.compensation.projections import find_projections
from blockpruner.engine.compensation.replica import CompensationReplica, StagesUnit, SumsUnit
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.holding import devices_of, load_decoder, while_loading
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer, UnitResult
from blockpruner.engine.scoring.scoring import ScoringReplica, ScoringSpec
from blockpruner.engine.scoring.sharing import SharingUnit, run_wrapped
from blockpruner.engine.work.memory import Placement
from blockpruner.engine.work.units import WorkUnit


@dataclass(frozen=True)
class Fitted:
    """The weights of a fit."""

    digest: str
    changed: Changed


class CompensatedUnit(SharingUnit[Fitted]):
    """Score masks with the weights of a fit."""

    def __str__(self) -> str:
        return f"{self.unit} with fitted weights"


@dataclass(frozen=True, eq=False)
class FitUnit:
    """A part of the fit of a mask."""

    unit: SumsUnit | StagesUnit
    mask: Mask

    @property
    def flops(self) -> float:
        return self.unit.flops

    @property
    def home(self) -> Any:
        return self.unit.home

    def __str__(self) -> str:
        return f"{self.unit}, to fit {self.mask}"


@dataclass(frozen=True, kw_only=True)
class CompensatingSpec(ScoringSpec):
    """A replica whose data are the windows to score on, and the windows to fit on."""

    tokens_per_call: int
    """Of a fit."""

    def open(self, data: tuple[Tensor, Tensor]) -> CompensatingReplica:  # type: ignore[override]
        torch.set_num_threads(self.threads)
        with while_loading(self.placement):
            decoder = load_decoder(self.model, self.dtype, self.placement, devices_of(self.device, self.num_devices))
            on_device = self.placement is not Placement.STREAMED
            return CompensatingReplica(decoder, *data, self.tokens_per_call, on_device=on_device)


class CompensatingReplica:
    def __init__(
        self, decoder: Decoder, scored_on: Tensor, fitted_on: Tensor, tokens_per_call: int, *, on_device: bool = True
    ) -> None:
        """scored_on, fitted_on: token ids [num_windows, seq_len]. on_device: see `InPlace`."""
        self._decoder, self._fitted_on, self._tokens_per_call = decoder, fitted_on, tokens_per_call
        self._scoring, self._on_device = ScoringReplica(decoder, scored_on), on_device
        self._found = find_projections(decoder)
        self._in_place = InPlace(decoder, self._found, on_device=on_device)
        self._fit: tuple[Mask, CompensationReplica] | None = None

    def score(self, unit: WorkUnit | CompensatedUnit | FitUnit) -> tuple[Any, float]:
        """Return what the unit asks for, and the seconds taken. Raises DeviceMemoryError."""
        if isinstance(unit, CompensatedUnit):
            assert unit.shared is not None
            self._fit = None  # its streams are large
            self._in_place.put(unit.shared.digest, unit.shared.changed)
            return self._scoring.score(unit.unit)
        self.release()
        if isinstance(unit, WorkUnit):
            return self._scoring.score(unit)
        if self._fit is None or self._fit[0] != unit.mask:
            self._fit = None
            fit = CompensationReplica(
                self._decoder,
                self._fitted_on,
                unit.mask,
                self._tokens_per_call,
                found=self._found,
                on_device=self._on_device,
            )
            self._fit = unit.mask, fit
        return self._fit[1].score(unit.unit)

    def free_bytes(self) -> int | None:
        return self._scoring.free_bytes()

    def release(self) -> None:
        """Give the model its own weights back."""
        self._in_place.take_out()


@dataclass(frozen=True)
class FitScorer:
    """Runs the units of a fit on the replicas of a search. Implements `Scorer`."""

    scorer: Scorer
    mask: Mask

    @property
    def num_replicas(self) -> int:
        return self.scorer.num_replicas

    @property
    def num_lost(self) -> int:
        return self.scorer.num_lost

    def free_bytes(self) -> int | None:
        return self.scorer.free_bytes()

    def run(self, units: Sequence[Any]) -> Iterator[UnitResult[Any] | OutOfMemory[Any]]:
        yield from run_wrapped(self.scorer, [FitUnit(unit, self.mask) for unit in units])


def scored(
    scorer: Scorer, units: Sequence[WorkUnit], fitted: Fitted | None
) -> Iterator[UnitResult[WorkUnit] | OutOfMemory[Any]]:
    """Run the units of a search with the weights of a fit; None: with those of the dense model."""
    if fitted is None:
        yield from scorer.run(units)
        return
    yield from run_wrapped(scorer, [CompensatedUnit(unit, fitted) for unit in units])
