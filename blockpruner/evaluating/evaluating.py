"""Evaluates tasks and perplexity on replicas, for a model, a pruned checkpoint or the masks of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.cluster.opening import choose_device, open_scorer
from blockpruner.cluster.preflight import PACKAGES
from blockpruner.cluster.session import ray_session
from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import evaluation_windows
from blockpruner.engine.judge.evaluation import Perplexity
from blockpruner.engine.judge.judging import NLL, JudgingReplica
from blockpruner.engine.judge.tasks import Tasks
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.model.loading import (
    check_positions,
    load_config,
    load_tokenizer,
    materialize,
    resolve_dtype,
)
from blockpruner.engine.scoring.scorer import LocalScorer, Scorer
from blockpruner.engine.sections import Bos, ModelSource
from blockpruner.engine.text.bos import resolve_bos
from blockpruner.engine.text.rows import check_texts
from blockpruner.engine.text.tokens import check_ids
from blockpruner.evaluating.answers import Answers, recorded_model
from blockpruner.evaluating.asking import Asking
from blockpruner.evaluating.assignment import Evaluation
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.subjects import Subject, Subjects, subjects_of
from blockpruner.evaluating.telling import print_table, tell
from blockpruner.files import replacing, write_json
from blockpruner.showing.console import Reporter


@dataclass(frozen=True)
class GivenModel:
    """A model that a Python caller already has in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Resolved:
    """An evaluation with every automatic choice made."""

    dtype: str
    device: str
    threads: int
    fingerprint: str | None
    num_parameters: int
    windows: dict[str, Tensor]
    """Windows by text."""
    bos: Bos
    """Where BOS tokens stand in them."""
    open_scorer: Callable[[], Scorer]


def evaluate_model(
    config: EvaluationConfig,
    reporter: Reporter,
    *,
    out: Path | None = None,
    masks: tuple[Mask, ...] = (),
    given: GivenModel | None = None,
) -> dict[str, Any]:
    """Evaluate and return what `evaluate --json` prints.

    masks: masks to evaluate instead of the removals of a run. given: the model, if it is already in memory.
    out: folder for answers.jsonl (from which the same command resumes after an interruption), evaluation.json and
    samples.parquet (the score of every question and window).
    """
    subjects = subjects_of(config, masks, reporter)
    with ExitStack() as stack:
        if config.address is not None:
            stack.enter_context(ray_session(config.address))
        tasks = Tasks(config.tasks, config.include_path) if config.tasks else None
        if given is not None:
            resolved = _held(config, given, reporter)
        else:
            resolved = _resolve(config, subjects, reporter, stack, recorded_model(out), str(out or config.model))
        versions = {name: version(name) for name in ("blockpruner", *PACKAGES)}
        header = {
            "model": resolved.fingerprint,
            "dtype": resolved.dtype,
            "device": resolved.device,
            "threads": resolved.threads,
            "batch_size": config.batch_size,
            "versions": versions,
            **({} if subjects.channels is None else {"channels": subjects.channels.digest}),
        }
        answers = stack.enter_context(Answers(out, header))
        asking = Asking(resolved.num_parameters, resolved.open_scorer, answers, reporter)
        rows, samples = list[dict[str, Any]](), list[dict[str, Any]]()
        for subject in subjects.rows:
            row, of_this = _evaluate(config, subject, tasks, asking, resolved.windows, reporter)
            rows.append(row)
            samples += of_this
        last = {key: rows[-1][key] for key in ("tasks", "average", "perplexity")}
        result = {
            "model": config.model,
            "dtype": resolved.dtype,
            **last,
            **({"rows": rows} if config.run or masks else {}),
            "setting": _setting(config, resolved, subjects.revision, versions),
        }
        if out is not None:
            write_json(out / "evaluation.json", result)
            with replacing(out / "samples.parquet") as aside:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(samples), aside)
    if config.run and len(rows) > 1:
        print_table(rows, reporter)
    return result


def _evaluate(
    config: EvaluationConfig,
    subject: Subject,
    tasks: Tasks | None,
    asking: Asking,
    windows: dict[str, Tensor],
    reporter: Reporter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return one row of the results, and its samples."""
    scores = tasks.evaluate(asking.about(subject.mask, subject.name), config.limit) if tasks else None
    nlls = asking.nlls(subject.mask, subject.name, windows)
    row = {
        "num_remove": subject.num_remove,
        "mask": str(subject.mask),
        "ratio": subject.ratio,
        "tasks": scores.tasks if scores else {},
        "average": scores.average if scores else None,
        "perplexity": {
            text: {**asdict(Perplexity.of(values)), "seq_len": windows[text].shape[1]} for text, values in nlls.items()
        },
    }
    about_windows = [
        {"task": text, "question": index, "metric": NLL, "value": value}
        for text, values in nlls.items()
        for index, value in enumerate(values)
    ]
    tell(row, subject.name, scores, reporter)
    of_this = [*(scores.samples if scores else []), *about_windows]
    about = {name: row[name] for name in ("num_remove", "mask")}
    return row, [{**about, **sample} for sample in of_this]


def _resolve(
    config: EvaluationConfig, subjects: Subjects, reporter: Reporter, stack: ExitStack, like: str | None, run: str
) -> _Resolved:
    """like: see `fingerprint`. run: name of the evaluation for dashboards."""
    source = ModelSource(config.model, subjects.revision, config.trust_remote_code)
    device = choose_device(config, config.device, reporter.say)
    if config.dtype == "auto" and subjects.dtype is not None:
        dtype, reason = subjects.dtype, "the search's"
    else:
        dtype, reason = resolve_dtype(config.dtype, source, torch.device(device))
    check_texts(config.perplexity)  # before weights are fetched
    source = materialize(source, dtype, reporter.say)
    model_config = load_config(source)  # reports a wrong model before any slow work
    tokenizer = load_tokenizer(source)
    windows, bos = _windows(config, tokenizer, model_config, reporter)
    reporter.say(f"model {config.model} in {dtype} ({reason}) on {device}")
    evaluation = Evaluation(config, source, dtype, device, windows, subjects.channels)
    for note in evaluation.notes:
        reporter.say(f"note: {note}")

    def opened() -> Scorer:
        return stack.enter_context(open_scorer(config, evaluation, reporter.say, run)).scorer

    threads, num_parameters = evaluation.threads, evaluation.num_parameters
    return _Resolved(dtype, device, threads, fingerprint(source, like), num_parameters, windows, bos, opened)


def _held(config: EvaluationConfig, given: GivenModel, reporter: Reporter) -> _Resolved:
    """Use the model that the caller passed as the only replica, in this process."""
    model, tokenizer = given.model, given.tokenizer
    windows, bos = _windows(config, tokenizer, model.config, reporter)
    dtype, device = str(model.dtype).removeprefix("torch."), model.device.type

    def opened() -> Scorer:
        return LocalScorer(JudgingReplica(model.eval(), tokenizer, windows, config.batch_size))

    threads = torch.get_num_threads()
    return _Resolved(dtype, device, threads, "in memory", model.num_parameters(), windows, bos, opened)


def _windows(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, reporter: Reporter
) -> tuple[dict[str, Tensor], Bos]:
    """Return the windows by the name of the text, or by `text@length` if there are several lengths, and where BOS
    tokens stand in them."""
    windows = {}
    notes: dict[str, None] = {}
    bos = resolve_bos(config.bos, tokenizer, model_config.model_type)
    for seq_len in config.seq_len:
        if config.perplexity:
            check_positions(model_config, seq_len)
        for text in config.perplexity:
            name = text if len(config.seq_len) == 1 else f"{text}@{seq_len}"
            found = evaluation_windows(
                text, tokenizer, seq_len=seq_len, text_column=config.text_column, chat_template=config.chat_template,
                bos=bos, model_type=model_config.model_type,
            )  # fmt: skip
            notes |= dict.fromkeys(found.notes)
            windows[name] = found.tokens[: config.num_windows]
            check_ids(windows[name], model_config.get_text_config().vocab_size)
    for note in notes:
        reporter.say(f"note: {note}")
    return windows, bos


def _setting(
    config: EvaluationConfig, resolved: _Resolved, revision: str | None, versions: dict[str, str]
) -> dict[str, Any]:
    """Return the options that the results depend on. The number of replicas is not one of them."""
    return {
        "device": resolved.device,
        "dtype": resolved.dtype,
        "threads_per_replica": resolved.threads,
        "batch_size": config.batch_size,
        "tasks": list(config.tasks),
        "include_path": config.include_path and str(config.include_path),
        "limit": config.limit,
        "perplexity": list(config.perplexity),
        "text_column": config.text_column if config.perplexity else None,
        "chat_template": config.chat_template if config.perplexity else None,
        "seq_len": list(config.seq_len) if config.perplexity else None,
        "bos": resolved.bos if config.perplexity else None,
        "num_windows": config.num_windows,
        "run": config.run and str(config.run),
        "num_remove": list(config.num_remove),
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "versions": versions,
    }
