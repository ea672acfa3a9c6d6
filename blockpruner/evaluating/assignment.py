"""The specification of the replicas of an evaluation, and the resources that they need on a node."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from blockpruner.cluster.nodes import Needs, default_threads
from blockpruner.cluster.opening import PROCESS_BYTES
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.judging import JudgingSpec
from blockpruner.engine.model.loading import DTYPES, check_tensors, meta_model, stored_dtype
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import GIB
from blockpruner.evaluating.config import EvaluationConfig

LONGEST_TOKENS = 2048


class Evaluation:
    """Implements `opening.Assignment`."""

    result_bytes = 0

    def __init__(
        self,
        config: EvaluationConfig,
        model: ModelSource,
        dtype: str,
        device: str,
        data: Mapping[str, Tensor],
        channels: ChannelOrder | None = None,
    ) -> None:
        """channels: their order, if masks lack groups of them."""
        self._channels = channels
        self.model, self.dtype, self.device, self.data = model, dtype, device, data
        self.threads = default_threads(config)
        self.num_gpus = 1 if device == "cuda" else 0
        self._batch_size = config.batch_size
        self._replicas = config.replicas
        skeleton = meta_model(model, dtype)
        self.notes = check_tensors(skeleton, model)
        self.num_parameters = skeleton.num_parameters()
        self._weights_bytes = self.num_parameters * DTYPES[dtype].itemsize
        # log_softmax over all positions holds the logits and a copy of them.
        self._call_bytes = config.batch_size * LONGEST_TOKENS * skeleton.config.get_text_config().vocab_size * 8

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[JudgingSpec, Needs]:
        spec = JudgingSpec(
            model=self.model,
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
            batch_size=self._batch_size,
            channels=self._channels,
        )
        if self.device == "cuda":
            if self._weights_bytes > memory_bytes:
                raise UserError(
                    f"expected a model that fits one GPU, got {self._weights_bytes / GIB:.1f} GiB of weights for "
                    f"{memory_bytes / GIB:.1f} GiB; use a smaller `dtype`, or `device=cpu`."
                )
            return spec, Needs(self.threads, 1)
        is_mapped = stored_dtype(self.model) == self.dtype
        weights = 0 if is_mapped else self._weights_bytes
        least = PROCESS_BYTES + weights
        return spec, Needs(self.threads, 0, 0 if self._replicas is not None else least + self._call_bytes, least)
