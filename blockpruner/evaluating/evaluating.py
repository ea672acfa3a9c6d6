"""Tasks and perplexity of a model, a pruned checkpoint, or the masks of a run, on replicas."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from lm_eval.api.instance import Instance
from rich.table import Table
from torch import Tensor

from blockpruner.cluster.nodes import Needs, default_threads
from blockpruner.cluster.opening import PROCESS_BYTES, choose_device, open_scorer
from blockpruner.cluster.preflight import PACKAGES
from blockpruner.cluster.session import ray_session
from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import evaluation_windows
from blockpruner.engine.errors import NotFinite, SearchFailed, UserError
from blockpruner.engine.judge.evaluation import Perplexity
from blockpruner.engine.judge.evaluator import NLL, EvaluationUnit, EvaluatorSpec
from blockpruner.engine.judge.tasks import Answer, Tasks, TaskScores
from blockpruner.engine.model.loading import (
    DTYPES,
    ModelSource,
    check_positions,
    fingerprint,
    load_config,
    load_tokenizer,
    materialize,
    meta_model,
    resolve_dtype,
    stored_dtype,
)
from blockpruner.engine.scoring.scoring import OutOfMemory, Scorer
from blockpruner.engine.work.memory import GIB
from blockpruner.evaluating.answers import Answers
from blockpruner.files import replacing, write_json
from blockpruner.searching.config import check_least, check_one_process
from blockpruner.searching.run import read_removals
from blockpruner.showing.console import Reporter

REQUESTS, CHARACTERS = 32, 2**15
"""In a unit, before it is full: some seconds of work, so that replicas end together and little is lost with one."""
CHARACTERS_PER_TOKEN = 4
"""About, of English: it orders units, and sets their deadlines."""
GENERATED = 16
"""Tokens of a prompt that take about as long as a generated one."""
LONGEST_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    model: str
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    """Questions of each task."""
    perplexity: tuple[str, ...] = ()
    """`wikitext2` (test split) or files."""
    text_column: str = "text"
    seq_len: tuple[int, ...] = (2048,)
    """Tokens of the windows for perplexity."""
    num_windows: int | None = None
    run: Path | None = None
    num_remove: tuple[int, ...] = ()
    """Removals of the run to evaluate; 0 is the dense model."""
    masks: tuple[Mask, ...] = ()
    """What to evaluate, instead of the removals of a run."""
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    replicas: int | None = None
    threads_per_replica: int | None = None
    address: str | None = None
    no_ray: bool = False
    allow_mixed: bool = False
    task_timeout_s: float = 600.0
    resource_timeout_s: float = 60.0
    revision: str | None = None
    trust_remote_code: bool = False

    gpus_per_replica = None
    """An evaluation holds the whole model on one device."""

    def __post_init__(self) -> None:
        if not self.tasks and not self.perplexity:
            raise UserError("nothing to evaluate: give --tasks, or --perplexity wikitext2, builtin or FILE.")
        if self.num_remove and self.run is None:
            raise UserError("expected --num-remove together with --run RUN, whose removals it counts.")
        if self.include_path is not None and not self.tasks:
            raise UserError("expected --include-path together with --tasks.")
        if self.no_ray:
            check_one_process(self.replicas, self.address)
        check_least(
            self, 1, "limit", "num_windows", "batch_size", "replicas", "threads_per_replica", "task_timeout_s",
            "resource_timeout_s",
        )  # fmt: skip


class _Evaluation:
    """Implements `opening.Assignment`."""

    def __init__(
        self, config: EvaluationConfig, model: ModelSource, dtype: str, device: str, data: Mapping[str, Tensor]
    ) -> None:
        self.model, self.dtype, self.device, self.data = model, dtype, device, data
        self.threads = default_threads(config)
        self._batch_size = config.batch_size
        self._replicas = config.replicas
        skeleton = meta_model(model, dtype)
        self.num_parameters = skeleton.num_parameters()
        self._weights_bytes = self.num_parameters * DTYPES[dtype].itemsize
        # log_softmax over all positions: logits and their copy.
        self._call_bytes = config.batch_size * LONGEST_TOKENS * skeleton.config.get_text_config().vocab_size * 8

    def settle(self, memory_bytes: int, gpus_per_node: int) -> tuple[EvaluatorSpec, Needs]:
        spec = EvaluatorSpec(
            model=self.model, dtype=self.dtype, device=self.device, threads=self.threads, batch_size=self._batch_size
        )
        if self.device == "cuda":
            if self._weights_bytes > memory_bytes:
                raise UserError(
                    f"expected a model that fits one GPU, got {self._weights_bytes / GIB:.1f} GiB of weights for "
                    f"{memory_bytes / GIB:.1f} GiB; use a smaller --dtype, or --device cpu."
                )
            return spec, Needs(self.threads, 1)
        is_mapped = stored_dtype(self.model) == self.dtype
        weights = 0 if is_mapped else self._weights_bytes
        return spec, Needs(
            self.threads, 0, 0 if self._replicas is not None else PROCESS_BYTES + weights + self._call_bytes
        )


def evaluate_model(config: EvaluationConfig, reporter: Reporter, *, out: Path | None = None) -> dict[str, Any]:
    """Returns what `evaluate --json` prints.

    With `out`, a folder: answers.jsonl, from which the same command goes on after an interruption, evaluation.json, and
    samples.parquet (the score of every question and window).
    """
    masks, revision, searched_dtype = _masks(config, reporter)
    source = ModelSource(config.model, revision, config.trust_remote_code)
    with ExitStack() as stack:
        if config.address is not None:
            stack.enter_context(ray_session(config.address))
        device = choose_device(config, config.device, reporter.say)
        if config.dtype == "auto" and searched_dtype is not None:
            dtype, reason = searched_dtype, "the search's"
        else:
            dtype, reason = resolve_dtype(config.dtype, source, torch.device(device))
        source = materialize(source, dtype, reporter.say)
        load_config(source)  # a wrong model is told before anything slow
        tasks = Tasks(config.tasks, config.include_path) if config.tasks else None
        windows = _windows(config, source)
        reporter.say(f"model {config.model} in {dtype} ({reason}) on {device}")
        evaluation = _Evaluation(config, source, dtype, device, windows)
        versions = {name: version(name) for name in ("blockpruner", *PACKAGES)}
        header = {
            "model": fingerprint(source),
            "dtype": dtype,
            "device": device,
            "threads": evaluation.threads,
            "batch_size": config.batch_size,
            "versions": versions,
        }
        answers = stack.enter_context(Answers(out, header))
        asking = _Asking(config, evaluation, answers, reporter, stack)
        rows, samples = [], []
        for num_remove, mask, ratio in masks:
            name = _name(config, num_remove, mask)
            scores = tasks.evaluate(asking.about(mask, name), config.limit) if tasks else None
            nlls = asking.nlls(mask, name, windows)
            rows.append(
                {
                    "num_remove": num_remove,
                    "ratio": ratio,
                    "tasks": scores.tasks if scores else {},
                    "average": scores.average if scores else None,
                    "perplexity": {
                        text: {**asdict(Perplexity.of(values)), "seq_len": windows[text].shape[1]}
                        for text, values in nlls.items()
                    },
                }
            )
            about_windows = [
                {"task": text, "question": index, "metric": NLL, "value": value}
                for text, values in nlls.items()
                for index, value in enumerate(values)
            ]
            of_this = [*(scores.samples if scores else []), *about_windows]
            samples += [{"num_remove": num_remove, "mask": str(mask), **sample} for sample in of_this]
            _tell(rows[-1], name, scores, reporter)
        last = {key: rows[-1][key] for key in ("tasks", "average", "perplexity")}
        result = {
            "model": config.model,
            "dtype": dtype,
            **last,
            **({"rows": rows} if config.run or config.masks else {}),
            "setting": _setting(config, evaluation, revision, versions),
        }
        if out is not None:
            write_json(out / "evaluation.json", result)
            with replacing(out / "samples.parquet") as aside:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(samples), aside)
    if config.run and len(rows) > 1:
        _print_table(rows, reporter)
    return result


def _setting(
    config: EvaluationConfig, evaluation: _Evaluation, revision: str | None, versions: dict[str, str]
) -> dict[str, Any]:
    """What the numbers depend on, by the options that ask for it. The number of replicas is not among them."""
    return {
        "device": evaluation.device,
        "dtype": evaluation.dtype,
        "threads_per_replica": evaluation.threads,
        "batch_size": config.batch_size,
        "tasks": list(config.tasks),
        "include_path": config.include_path and str(config.include_path),
        "limit": config.limit,
        "perplexity": list(config.perplexity),
        "text_column": config.text_column if config.perplexity else None,
        "seq_len": list(config.seq_len) if config.perplexity else None,
        "num_windows": config.num_windows,
        "run": config.run and str(config.run),
        "num_remove": list(config.num_remove),
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "versions": versions,
    }


def _masks(
    config: EvaluationConfig, reporter: Reporter
) -> tuple[list[tuple[int | None, Mask, float | None]], str | None, str | None]:
    """What to evaluate: the number of removals, the mask, the share of the parameters. And the model's revision, and
    the dtype in which a run searched it."""
    if config.run is None:
        return [(None, mask, None) for mask in config.masks or (Mask(),)], config.revision, None
    removals, revision = read_removals(config.run, config.model, config.revision)
    steps = removals.steps
    if not steps and not config.num_remove:
        raise UserError(
            f"expected a run that removed blocks, got {str(config.run)!r} without steps; --num-remove 0 evaluates the "
            f"dense model."
        )
    numbers = config.num_remove or (len(steps),)
    wrong = [number for number in numbers if not 0 <= number <= len(steps)]
    if wrong:
        raise UserError(f"expected --num-remove from 0 to {len(steps)} (the steps in {config.run}), got {wrong[0]}.")
    for number in numbers:
        removals.warn_if_unscored(number, reporter.say)
    masks: list[tuple[int | None, Mask, float | None]] = [
        (number, Mask.of(removals.order[:number]), steps[number - 1]["ratio"] if number else 0.0)
        for number in dict.fromkeys(numbers)
    ]
    return masks, revision, removals.summary["dtype"]


def _windows(config: EvaluationConfig, source: ModelSource) -> dict[str, Tensor]:
    """By the name of the text; with several lengths, `text@length`."""
    tokenizer = load_tokenizer(source)
    windows = {}
    for seq_len in config.seq_len:
        if config.perplexity:
            check_positions(load_config(source), seq_len)
        for text in config.perplexity:
            name = text if len(config.seq_len) == 1 else f"{text}@{seq_len}"
            found = evaluation_windows(text, tokenizer, seq_len=seq_len, text_column=config.text_column)
            windows[name] = found.tokens[: config.num_windows]
    return windows


def _name(config: EvaluationConfig, num_remove: int | None, mask: Mask) -> str:
    """Of a row, for people."""
    if config.masks:
        return f"{config.model} without {mask}" if mask.absent else f"{config.model}, dense"
    return config.model if num_remove is None else f"{num_remove} removed" if num_remove else "dense"


class _Asking:
    """Requests to units to answers: known ones from the folder, the others from replicas, opened when first needed."""

    def __init__(
        self, config: EvaluationConfig, evaluation: _Evaluation, answers: Answers, reporter: Reporter, stack: ExitStack
    ) -> None:
        self._config, self._evaluation, self._answers = config, evaluation, answers
        self._reporter, self._stack = reporter, stack
        self._scorer: Scorer | None = None

    def about(self, mask: Mask, name: str) -> Answer:
        """Answers lm-eval's requests with the blocks of `mask` absent."""

        def answer(kind: str, requests: Sequence[Instance]) -> list[Any]:
            units = [self._unit(mask, kind, chunk) for chunk in _chunks(requests)]
            return [value for values in self._answer(units, f"{name}: tasks") for value in values]

        return answer

    def nlls(self, mask: Mask, name: str, windows: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Mean token NLL of each window of each text."""
        found = {}
        for text, tokens in windows.items():
            digests = [hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in tokens]
            flops = 2.0 * self._evaluation.num_parameters * tokens.shape[1]
            units = [
                EvaluationUnit(mask, NLL, ((text, index, digest),), flops, f"window {index} of {text}")
                for index, digest in enumerate(digests)
            ]
            found[text] = [values[0] for values in self._answer(units, f"{name}: perplexity on {text}")]
        return found

    def _unit(self, mask: Mask, kind: str, requests: Sequence[Instance]) -> EvaluationUnit:
        arguments = tuple(request.args for request in requests)
        tokens = sum(map(_characters, requests)) / CHARACTERS_PER_TOKEN
        # A generated token costs more than one of a prompt, since each reads all weights.
        options = [part for parts in arguments for part in parts if isinstance(part, dict)]
        tokens += sum(GENERATED * option.get("max_gen_toks", 256) for option in options)
        flops = 2.0 * self._evaluation.num_parameters * max(tokens, 1.0)
        return EvaluationUnit(mask, kind, arguments, flops, f"{len(requests)} requests of task {requests[0].task_name}")

    def _answer(self, units: list[EvaluationUnit], description: str) -> list[list[Any]]:
        """The units' answers, in their order."""
        missing = [unit for unit in units if unit not in self._answers]
        if missing and self._scorer is None:
            opened = open_scorer(self._config, self._evaluation, self._reporter.say)
            self._scorer = self._stack.enter_context(opened).scorer
        with self._reporter.bar(description, sum(unit.flops for unit in missing)):
            for result in self._scorer.run(missing) if self._scorer else ():
                if isinstance(result, OutOfMemory):
                    raise SearchFailed(
                        f"{result.unit} did not fit the device's memory ({result.reason}); use a smaller --batch-size, "
                        f"--seq-len or --dtype."
                    )
                _check_finite(result.unit, result.value.answers)
                self._answers.add(result.unit, result.value)
                self._reporter.advance(result.unit.flops)
        answered = [self._answers[unit] for unit in units]
        if cuts := [cut for one in answered for cut in one.cuts]:
            self._reporter.say(f"note: {description}: {len(cuts)} inputs lost their beginning ({cuts[0]})")
        return [one.answers for one in answered]


def _chunks(requests: Sequence[Instance]) -> Iterator[list[Instance]]:
    """Neighbours, in chunks of one task's whole questions: other tasks beside it change nothing."""
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
    """A likelihood that is no number would count as a wrong answer, or a right one."""
    values = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
    if unit.kind != NLL and any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise NotFinite(
            f"the model's likelihoods are not finite in {unit}; use --dtype bfloat16 or float32, which reach further."
        )


def _tell(row: dict[str, Any], name: str, scores: TaskScores | None, reporter: Reporter) -> None:
    if scores is not None:
        grid = Table("task", "acc", "acc_norm", "score ± stderr", title=name)
        for column in grid.columns[1:]:
            column.justify = "right"
        for task, values in row["tasks"].items():
            grid.add_row(task, *(_percent(values[key]) for key in ("acc", "acc_norm")), _with_error(values))
        grid.add_section()
        grid.add_row("average", "", "", _percent(row["average"]))
        reporter.console.print(grid)
    for text, found in row["perplexity"].items():
        spread = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
        reporter.say(
            f"{name}: perplexity on {text} {found['value']:.4f}{spread} "
            f"({found['num_windows']} windows of {found['seq_len']})"
        )


def _print_table(rows: Sequence[dict[str, Any]], reporter: Reporter) -> None:
    """One row for each number of removals."""
    tasks, texts = list(rows[0]["tasks"]), list(rows[0]["perplexity"])
    grid = Table("removed", "ratio", *tasks, *(["average"] if tasks else []), *(f"PPL {text}" for text in texts))
    for column in grid.columns:
        column.justify, column.overflow = "right", "fold"  # a number that is cut is another number
    for row in rows:
        cells = [_with_error(row["tasks"][task]) for task in tasks] + ([_percent(row["average"])] if tasks else [])
        for found in (row["perplexity"][text] for text in texts):
            cells.append(f"{found['value']:.2f}" + ("" if found["stderr"] is None else f" ± {found['stderr']:.2f}"))
        grid.add_row(str(row["num_remove"]), f"{row['ratio']:.1%}", *cells)
    reporter.console.print(grid)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _with_error(values: dict[str, Any]) -> str:
    if values["score"] is None:  # scored by something else than answers, as WikiText is
        metrics = values["metrics"]
        # With a filter, the names are `exact_match,strict` and `exact_match_stderr,strict`.
        errors = {name: metrics.get(re.sub("(?=,)|$", "_stderr", name, count=1)) for name in metrics}
        return ", ".join(
            f"{name} {value:.4g}" + ("" if errors[name] is None else f" ± {errors[name]:.2g}")
            for name, value in metrics.items()
            if "stderr" not in name
        )
    return _percent(values["score"]) + (f" ± {100 * values['stderr']:.2f}" if values["stderr"] is not None else "")
