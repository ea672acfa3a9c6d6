"""What a replica does in an evaluation: it holds the dense model, takes blocks out in memory, and answers requests."""

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

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import DeviceMemoryError, first_line
from blockpruner.engine.judge.evaluation import mean_nll
from blockpruner.engine.model.host_memory import keep_freed_memory
from blockpruner.engine.model.loading import ModelSource, load_model, load_tokenizer
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.scoring import full_memory_ends, is_out_of_memory

NLL = "nll"
"""The type of request that asks for windows' mean token NLL; the others are lm-eval's."""


@dataclass(frozen=True, eq=False)
class EvaluationUnit:
    """Requests of one type to the model without the mask's blocks. Always the same ones together, so that answers do
    not depend on the number of replicas."""

    mask: Mask
    kind: str
    """`nll`, or a method of lm-eval's models."""
    requests: tuple[Any, ...]
    """`nll`: (text, window, digest of its tokens); else the arguments of lm-eval's requests."""
    flops: float
    name: str
    """For people."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class EvaluatorSpec:
    """What a replica of an evaluation holds, and where."""

    model: ModelSource
    dtype: str
    device: str
    threads: int
    batch_size: int = 1
    """Requests in one call."""

    def open(self, data: Mapping[str, Tensor]) -> Evaluator:
        """data: windows [num_windows, seq_len] of each text."""
        return Evaluator(self, data)


@dataclass
class Answered:
    """What came of a unit."""

    answers: list[Any]
    """One for each request."""
    cuts: list[str]
    """What lm-eval said of requests that are longer than the model's positions."""


class Evaluator:
    def __init__(self, spec: EvaluatorSpec, windows: Mapping[str, Tensor]) -> None:
        torch.set_num_threads(spec.threads)
        keep_freed_memory()
        with full_memory_ends(
            "before the model is loaded", "other programs may use it; free it, or use fewer --replicas."
        ):
            self._dense = load_model(spec.model, spec.dtype, spec.device)
        self._tokenizer = load_tokenizer(spec.model)
        self._batch_size = spec.batch_size
        self._windows = windows
        self._open(Mask())

    def score(self, unit: EvaluationUnit) -> tuple[Answered, float]:
        """The answers, and the seconds that they took. Raises DeviceMemoryError."""
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
        self._mask = mask
        self._model = prune(self._dense, mask) if mask.absent else self._dense
        self._harness: HFLM | None = None

    def _answer(self, unit: EvaluationUnit) -> list[Any]:
        if unit.kind == NLL:
            return [mean_nll(self._model, self._windows[text][window]) for text, window, _ in unit.requests]
        if self._harness is None:
            self._harness = HFLM(
                pretrained=self._model, tokenizer=self._tokenizer, backend="causal", batch_size=self._batch_size
            )
        requests = [Instance(unit.kind, {}, arguments, 0) for arguments in unit.requests]
        with redirect_stderr(StringIO()):  # a rolling likelihood draws a bar for each text, whatever it is told
            return list(getattr(self._harness, unit.kind)(requests, disable_tqdm=True))


@contextmanager
def _counting_cuts() -> Iterator[list[str]]:
    """lm-eval says only in its log that it cuts off the beginning of a request."""
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
