"""Groups requests into units of work and answers them, from the folder if they are known, else from replicas."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from torch import Tensor

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import NotFinite, SearchFailed
from blockpruner.engine.judge.judging import NLL, EvaluationUnit
from blockpruner.engine.judge.tasks import Answer
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer
from blockpruner.evaluating.answers import Answers
from blockpruner.showing.console import Reporter

REQUESTS, CHARACTERS = 32, 2**15
"""A unit is full at this size, which takes some seconds: replicas finish together, and losing one loses little work."""
CHARACTERS_PER_TOKEN = 4
"""Rough value for English, used to order units and set their deadlines."""
GENERATED = 16
"""Number of prompt tokens that take about as long as one generated token."""


class Asking:
    """Answers requests, from the folder if they are known, else from replicas, which open when first needed."""

    def __init__(
        self, num_parameters: int, open_scorer: Callable[[], Scorer], answers: Answers, reporter: Reporter
    ) -> None:
        """num_parameters: size of the model, for estimates of the work.

        open_scorer: called when `answers` does not contain a requested unit.
        """
        self._num_parameters, self._open, self._answers = num_parameters, open_scorer, answers
        self._reporter = reporter
        self._scorer: Scorer | None = None

    def about(self, mask: Mask, name: str) -> Answer:
        """Return a function that answers lm-eval's requests with the blocks of `mask` removed."""

        def answer(kind: str, requests: Sequence[Instance]) -> list[Any]:
            units = [self._unit(mask, kind, chunk) for chunk in _chunks(requests)]
            return [value for values in self._answer(units, f"{name}: tasks") for value in values]

        return answer

    def nlls(self, mask: Mask, name: str, windows: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Return the mean token NLL of each window, by text."""
        found = {}
        for text, tokens in windows.items():
            digests = [hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in tokens]
            flops = 2.0 * self._num_parameters * tokens.shape[1]
            units = [
                EvaluationUnit(mask, NLL, ((text, index, digest),), flops, f"window {index} of {text}")
                for index, digest in enumerate(digests)
            ]
            found[text] = [values[0] for values in self._answer(units, f"{name}: perplexity on {text}")]
        return found

    def _unit(self, mask: Mask, kind: str, requests: Sequence[Instance]) -> EvaluationUnit:
        arguments = tuple(request.args for request in requests)
        tokens = sum(map(_characters, requests)) / CHARACTERS_PER_TOKEN
        # A generated token costs more than a prompt token, since each one reads all weights.
        options = [part for parts in arguments for part in parts if isinstance(part, dict)]
        tokens += sum(GENERATED * option.get("max_gen_toks", 256) for option in options)
        flops = 2.0 * self._num_parameters * max(tokens, 1.0)
        return EvaluationUnit(mask, kind, arguments, flops, f"{len(requests)} requests of task {requests[0].task_name}")

    def _answer(self, units: list[EvaluationUnit], description: str) -> list[list[Any]]:
        """Return the answers of the units, in the order of the units."""
        missing = [unit for unit in units if unit not in self._answers]
        if missing and self._scorer is None:
            self._scorer = self._open()
        with self._reporter.bar(description, sum(unit.flops for unit in missing)):
            for result in self._scorer.run(missing) if self._scorer else ():
                if isinstance(result, OutOfMemory):
                    raise SearchFailed(
                        f"{result.unit} does not fit into device memory ({result.reason}); use a smaller `batch_size`, "
                        f"`seq_len` or `dtype`."
                    )
                _check_finite(result.unit, result.value.answers)
                self._answers.add(result.unit, result.value)
                self._reporter.advance(result.unit.flops)
        answered = [self._answers[unit] for unit in units]
        if cuts := [cut for one in answered for cut in one.cuts]:
            self._reporter.say(f"note: {description}: the beginning of {len(cuts)} inputs was truncated ({cuts[0]})")
        return [one.answers for one in answered]


def _chunks(requests: Sequence[Instance]) -> Iterator[list[Instance]]:
    """Split requests into chunks of consecutive whole questions of one task, so that other tasks change nothing."""
    for _, task in groupby(requests, key=lambda request: request.task_name):
        chunk: list[Instance] = []
        for _, question in groupby(task, key=lambda request: request.doc_id):
            chunk += question
            if len(chunk) >= REQUESTS or sum(map(_characters, chunk)) >= CHARACTERS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _characters(request: Instance) -> int:
    return sum(len(part) for part in request.args if isinstance(part, str))


def _check_finite(unit: EvaluationUnit, answers: list[Any]) -> None:
    """Raise NotFinite for NaN and infinite likelihoods, which would count as wrong or even right answers."""
    values = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
    if unit.kind != NLL and any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise NotFinite(
            f"the model produced NaN or infinite likelihoods in {unit}; use `dtype` bfloat16 or float32, which have a "
            f"larger range."
        )
