"""The specification of the replicas of a compensation, and the resources that they need on a node."""

from __future__ import annotations

from torch import Tensor

from blockpruner.cluster.nodes import Needs, default_threads
from blockpruner.cluster.opening import PROCESS_BYTES, Say
from blockpruner.compensating.config import CompensateConfig
from blockpruner.engine.blocks import Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.compensation.fitting import Cost
from blockpruner.engine.compensation.memory import FitMemory
from blockpruner.engine.compensation.replica import TOKENS_PER_CALL, CompensationSpec
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import DTYPES, stored_dtype
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import GIB, ModelBytes, resolve_placement


class Compensation:
    """Implements `opening.Assignment`."""

    def __init__(
        self,
        config: CompensateConfig,
        model: ModelSource,
        decoder: Decoder,
        mask: Mask,
        *,
        dtype: str,
        device: str,
        data: Tensor,
        kept: ChannelOrder | None,
        say: Say,
    ) -> None:
        """decoder: the dense model without weights. data: token ids of all windows [num_windows, seq_len]. kept: the
        channels that narrower MLPs have."""
        self._kept = kept
        self.model, self.device, self.data = model, device, data
        self.threads = default_threads(config)
        self.num_gpus = (config.gpus_per_replica or 1) if device == "cuda" else 0
        self._config, self._shape, self._mask, self._dtype = config, decoder.shape, mask, dtype
        self._memory = FitMemory.of(decoder, config.part(Fit))
        self._say = say

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[CompensationSpec, Needs]:
        sizes = ModelBytes.of(self._shape, DTYPES[self._dtype].itemsize)
        on_gpu = self.device == "cuda"
        working = self.call_bytes + self._memory.sums_bytes
        if not on_gpu:
            working += self._memory.stream_bytes(self.data.numel(), DTYPES[self._dtype].itemsize) + PROCESS_BYTES
        placement, num_devices = resolve_placement(
            self._config.placement,
            sizes,
            memory_bytes,
            on_gpu=on_gpu,
            gpus_per_replica=self._config.gpus_per_replica,
            gpus_per_node=gpus_per_node,
            working_bytes=working,
        )
        self._say(
            f"{placement} model ({sizes.total / GIB:.2f} GiB of weights), {working / GIB:.2f} GiB for sums"
            f"{'' if on_gpu else ' and streams'}"
        )
        spec = CompensationSpec(
            model=self.model,
            mask=self._mask,
            kept=self._kept,
            tokens_per_call=TOKENS_PER_CALL[self.device],
            dtype=self._dtype,
            device=self.device,
            placement=placement,
            num_devices=num_devices,
            threads=self.threads,
        )
        if on_gpu:
            return spec, Needs(self.threads, num_devices)
        is_mapped = stored_dtype(self.model) == self._dtype
        least = working + (0 if is_mapped else sizes.on_device(placement))
        return spec, Needs(self.threads, 0, 0 if self._config.replicas is not None else least, least)

    @property
    def call_bytes(self) -> int:
        """Working memory of one call."""
        bytes_per_value = DTYPES[self._dtype].itemsize
        tokens = max(TOKENS_PER_CALL[self.device], self.data.shape[1])
        return tokens * self._shape.activation_bytes(bytes_per_value, self.data.shape[1])

    @property
    def result_bytes(self) -> int:
        return self._memory.result_bytes

    @property
    def cost(self) -> Cost:
        return Cost.of(self._shape, self._memory.widest, self.data.shape[1])
