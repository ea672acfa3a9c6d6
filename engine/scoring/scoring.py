"""The replica of a search: computes the losses of masks on windows."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.engine.errors import DeviceMemoryError, first_line
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.full_memory import full_memory_ends, is_out_of_memory
from blockpruner.engine.model.holding import devices_of, load_decoder
from blockpruner.engine.model.host_memory import keep_freed_memory
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
        keep_freed_memory()
        devices = devices_of(self.device, self.num_devices)
        with full_memory_ends(
            f"before the {self.placement} model is loaded",
            "other programs may be using it. Free memory, or use `placement=streamed`, more `gpus_per_replica`, or "
            "fewer `replicas`.",
        ):
            return ScoringReplica(load_decoder(self.model, self.dtype, self.placement, devices), data, self.metric)


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
        try:
            if self._pass is None or self._pass.call_shape != call_shape:
                self._pass = ForkedPass(self._decoder, call_shape)
            sums = self._pass.window_sums(unit.masks, windows, self._metric).tolist()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        else:
            return sums, time.perf_counter() - start
        if self._decoder.device.type == "cuda":
            gc.collect()  # a reference cycle through the traceback may keep the failed sweep's tensors alive
            torch.cuda.empty_cache()
        raise DeviceMemoryError(reason)

    def free_bytes(self) -> int | None:
        """Memory that the weights leave free on the fullest device, in bytes; None on a CPU."""
        if self._decoder.device.type != "cuda":
            return None
        devices = {self._decoder.device, *self._decoder.layer_devices}
        return min(torch.cuda.mem_get_info(device)[0] for device in devices)
