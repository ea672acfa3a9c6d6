"""The replica of a search: computes the losses of masks on windows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.full_memory import within_memory
from blockpruner.engine.model.holding import devices_of, load_decoder, while_loading
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement
from blockpruner.engine.work.units import WorkUnit


@dataclass(frozen=True, kw_only=True)
class ScoringSpec:
    """Which model a replica holds, and on which devices."""

    model: ModelSource
    """The source that `loading.materialize` returned."""
    dtype: str
    device: str
    """cpu or cuda."""
    placement: Placement = Placement.RESIDENT
    num_devices: int = 1
    threads: int
    """CPU threads."""
    metric: Metric = PPL

    def open(self, data: Tensor) -> ScoringReplica:
        """Load the model. data: token ids of the windows [num_windows, seq_len]."""
        torch.set_num_threads(self.threads)
        with while_loading(self.placement):
            decoder = load_decoder(self.model, self.dtype, self.placement, devices_of(self.device, self.num_devices))
            return ScoringReplica(decoder, data, self.metric)


class ScoringReplica:
    """Owns one copy of the model and scores units with it. It does not know where it runs."""

    def __init__(self, decoder: Decoder, windows: Tensor, metric: Metric = PPL) -> None:
        """windows: token ids [num_windows, seq_len]. Raises UserError if removing blocks has no clear meaning in this
        model."""
        self._decoder, self._metric = decoder, metric
        check_removable(self._decoder)
        self._windows = windows.to(decoder.device)
        self._pass: ForkedPass | None = None

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        """Return loss sums [masks][windows of the unit] in nats, and the seconds taken. Raises DeviceMemoryError."""
        start = time.perf_counter()
        call_shape = CallShape(sequences_per_call=unit.kernel.rows, tokens_per_head_call=unit.kernel.head_tokens)
        windows = self._windows[unit.first : unit.stop]

        def sums() -> list[list[float]]:
            if self._pass is None or self._pass.call_shape != call_shape:
                self._pass = ForkedPass(self._decoder, call_shape)
            found: list[list[float]] = self._pass.window_sums(unit.masks, windows, self._metric).tolist()
            return found

        return within_memory(sums, self._decoder.device), time.perf_counter() - start

    def free_bytes(self) -> int | None:
        return self._decoder.free_bytes()
