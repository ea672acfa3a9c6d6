"""The replica of an evaluation: holds the dense model, removes blocks in memory, and answers requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.engine.blocks import Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import DeviceMemoryError, UserError, first_line
from blockpruner.engine.judge.evaluation import mean_nll
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.full_memory import full_memory_ends, is_out_of_memory
from blockpruner.engine.model.host_memory import keep_freed_memory
from blockpruner.engine.model.loading import load_model, load_tokenizer
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.text.tokens import check_ids

NLL = "nll"
"""Type of requests for the mean token NLL of windows. The other types are those of lm-eval."""


@dataclass(frozen=True, eq=False)
class EvaluationUnit:
    """Requests of one type to the model without the mask's blocks. Requests are always grouped in the same way, so that
    answers do not depend on the number of replicas."""

    mask: Mask
    kind: str
    """`nll` or the name of a method of lm-eval's models."""
    requests: tuple[Any, ...]
    """For `nll`, tuples of (text, window, digest of its tokens); otherwise the arguments of lm-eval's requests."""
    flops: float
    name: str
    """Name to display."""

    @property
    def home(self) -> None:
        return None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class JudgingSpec:
    """Which model a replica of an evaluation holds, and on which device."""

    model: ModelSource
    dtype: str
    device: str
    threads: int
    batch_size: int = 1
    """Number of requests in one call."""
    channels: ChannelOrder | None = None
    """The order of the channels, if masks lack groups of them."""

    def open(self, data: Mapping[str, Tensor]) -> JudgingReplica:
        """Load the model. data: token ids of the windows [num_windows, seq_len], by text."""
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        with full_memory_ends(
            "before the model is loaded",
            "other programs may be using it; free memory, or use fewer `replicas`.",
        ):
            dense = load_model(self.model, self.dtype, self.device)
        return JudgingReplica(dense, load_tokenizer(self.model), data, self.batch_size, self.channels)


@dataclass
class Answered:
    """Result of a unit."""

    answers: list[Any]
    """One answer per request."""
    cuts: list[str]
    """Messages of lm-eval about requests that are longer than the model's positions."""


class JudgingReplica:
    """Owns one copy of the model, removes blocks in memory, and answers requests."""

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        windows: Mapping[str, Tensor],
        batch_size: int = 1,
        channels: ChannelOrder | None = None,
    ) -> None:
        """windows: token ids [num_windows, seq_len], by text. batch_size: number of requests in one call. channels:
        their order, if masks lack groups of them."""
        self._channels = channels
        self._dense, self._tokenizer, self._windows, self._batch_size = dense, tokenizer, windows, batch_size
        self._is_checked = False
        self._open(Mask())

    def score(self, unit: EvaluationUnit) -> tuple[Answered, float]:
        """Return the answers and the seconds taken. Raises DeviceMemoryError."""
        start = time.perf_counter()
        if unit.mask != self._mask:
            self._open(unit.mask)
        try:
            with _counting_cuts() as cuts:
                answered = Answered(self._answer(unit), cuts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(first_line(error)) from error
        return answered, time.perf_counter() - start

    def free_bytes(self) -> int | None:
        return torch.cuda.mem_get_info(self._dense.device)[0] if self._dense.device.type == "cuda" else None

    def _open(self, mask: Mask) -> None:
        if mask.absent and not self._is_checked:
            check_removable(Decoder(self._dense))
            self._is_checked = True
        self._mask = mask
        self._model = prune(self._dense, mask, self._channels) if mask.absent else self._dense
        self._harness: HFLM | None = None

    def _answer(self, unit: EvaluationUnit) -> list[Any]:
        if unit.kind == NLL:
            return [mean_nll(self._model, self._windows[text][window]) for text, window, _ in unit.requests]
        if self._harness is None:
            _check_special_tokens(self._tokenizer, unit.kind)
            self._harness = _Harness(
                pretrained=self._model, tokenizer=self._tokenizer, backend="causal", batch_size=self._batch_size
            )
        requests = [Instance(unit.kind, {}, arguments, 0) for arguments in unit.requests]
        with redirect_stderr(StringIO()):  # a rolling likelihood shows a progress bar per text despite disable_tqdm
            return list(getattr(self._harness, unit.kind)(requests, disable_tqdm=True))


class _Harness(HFLM):  # type: ignore[misc]
    """lm-eval's model, but a token without an embedding raises UserError. On a GPU it would end the process.

    lm-eval tokenises with the tokenizer's defaults, so a Gemma's requests begin with the BOS token that they need.
    """

    def tok_encode(self, *arguments: Any, **options: Any) -> list[int]:
        ids: list[int] = super().tok_encode(*arguments, **options)
        self._check([torch.tensor(ids)])
        return ids

    def tok_batch_encode(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        ids, attention = super().tok_batch_encode(*arguments, **options)
        self._check(ids)
        return ids, attention

    def _check(self, ids: Tensor | list[Tensor]) -> None:
        check_ids(ids, self.model.get_input_embeddings().num_embeddings)


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Raise UserError if lm-eval cannot work with the tokenizer: it begins with BOS (or EOS), and generates until
    EOS."""
    if tokenizer.eos_token_id is None and (tokenizer.bos_token_id is None or kind == "generate_until"):
        raise UserError(
            "expected a tokenizer with an EOS token for `tasks`, got one without; add `eos_token` to its "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.bos_token  # lm-eval would add a token, which has no embedding


@contextmanager
def _counting_cuts() -> Iterator[list[str]]:
    """Collect the log messages in which lm-eval reports that it cut off the beginning of a request."""
    cuts: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "runcat" in record.getMessage():
                cuts.append(record.getMessage())

    log = logging.getLogger(HFLM.__module__)
    notes, level, propagate = Notes(), log.level, log.propagate
    log.addHandler(notes)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield cuts
    finally:
        log.removeHandler(notes)
        log.setLevel(level)
        log.propagate = propagate
