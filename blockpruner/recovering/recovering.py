"""Recovers a pruned checkpoint: trains, merges the result, and reports how much of the perplexity is recovered."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockpruner.cluster.training import train_on_ray
from blockpruner.engine.calibration import Windows
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_channels, read_pruned_provenance, write_grouped
from blockpruner.engine.checkpoint.provenance import check_base
from blockpruner.engine.compensation.names import projection_names
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.model.loading import (
    check_positions,
    load_config,
    load_model,
    load_tokenizer,
    materialize,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)
from blockpruner.engine.recovery.config import Loss, RecoveryConfig
from blockpruner.engine.recovery.teacher import load_teacher
from blockpruner.engine.recovery.trained.projections import Projections
from blockpruner.engine.recovery.training import draw_mixed_rows, recorded_losses, recovered_share, train
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.text.bos import resolve_bos
from blockpruner.engine.text.files import recorded_name
from blockpruner.engine.text.tokens import check_ids, cut_windows
from blockpruner.evaluating.perplexities import load_on, perplexities, text_windows
from blockpruner.files import check_new_folder, new_folder, write_json
from blockpruner.recovering.config import RecoverConfig
from blockpruner.recovering.work_folder import BEFORE, Perplexity, bos_to_use, read_back, recorded_model, work_folder
from blockpruner.showing.console import Reporter

REST = "rest"
"""Name of the evaluation text that consists of the rows not used for training."""
NUM_MEANS = 10
"""Number of mean losses in the provenance of a checkpoint, each over an equal part of the training."""
LINE_STEPS = 20
"""Without a terminal, a progress line is printed after this many steps."""


def recover_model(config: RecoverConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Train adapters for the pruned checkpoint in `folder`, merge them and write the result to `out`.

    `out` must not exist. Until the training is complete, `out` with `.work` appended contains its state, and the same
    call resumes from there. Perplexities of the dense, the pruned and the recovered model are measured on the texts of
    `perplexity` in windows of `seq_len`, all in the dtype of the training. Returns what `recover --json` prints.
    """
    folder, data, num_rows, gpus = config.folder, config.data, config.num_rows, config.gpus
    text_column, trust_remote_code = config.text_column, config.trust_remote_code
    training = config.part(RecoveryConfig)
    start = time.monotonic()
    provenance = _read_provenance(folder)
    kept = read_channels(folder, provenance)
    check_new_folder(out)
    place = resolve_device(config.device)
    if gpus > 1:
        _check_gpus(gpus, place, training)
    source = materialize(ModelSource(str(folder), trust_remote_code=trust_remote_code), config.dtype)
    dtype, reason = _training_dtype(config.dtype, source, place)
    model_config = load_config(source)
    check_positions(model_config, config.seq_len)
    tokenizer = load_tokenizer(source)
    bos = resolve_bos(bos_to_use(config.bos, out), tokenizer, model_config.model_type)
    chat_template = config.chat_template
    rows = draw_mixed_rows(
        data, tokenizer, num_rows=num_rows, seq_len=config.seq_len, seed=config.seed, text_column=text_column,
        chat_template=chat_template, bos=bos,
    )  # fmt: skip
    check_ids(rows.tokens, model_config.get_text_config().vocab_size)
    for note in rows.notes:
        reporter.say(f"note: {note}")
    if REST in config.perplexity and not rows.rest:
        raise UserError(
            f"`perplexity=rest` needs rows of {' and '.join(data)} that are not trained on; lower `num_rows`."
        )
    others = [text for text in config.perplexity if text != REST]
    sets = text_windows(
        others,
        tokenizer,
        model_config,
        seq_len=config.seq_len,
        text_column=text_column,
        chat_template=chat_template,
        bos=bos,
        num_windows=config.num_windows,
    )
    if REST in config.perplexity:
        rest = cut_windows("\n\n".join(rows.rest), tokenizer, config.seq_len, "the rest of `data`", bos)
        check_ids(rest, model_config.get_text_config().vocab_size)
        sets = {text: sets.get(text, rest[: config.num_windows]) for text in config.perplexity}
    drawn = {
        "data": recorded_name(data),
        "num_rows": num_rows,
        "text_column": text_column,
        "chat_template": chat_template,
        "bos": bos,
    }
    how = {**training.to_json(), **drawn, "dtype": dtype, "gpus": gpus}
    dense = ModelSource(provenance["base_model"], provenance["revision"], trust_remote_code)
    with work_folder(out, {**how, "model": fingerprint(source, recorded_model(out)), "rows": rows.fingerprint}) as work:
        before = _before(work, provenance, dense, source, dtype, place, sets, reporter)
        teacher, projections = None, frozenset[str]()
        distils, is_of_projections = config.loss is Loss.DISTILL, isinstance(training.train, Projections)
        if distils or is_of_projections:
            check_base(provenance, dense)
            made = materialize(dense, dtype, reporter.say)
            teacher = made if distils else None
            projections = projection_names(made) if is_of_projections else projections
        reporter.say(f"training on {len(rows.tokens)} rows in {dtype} ({reason}) on {place}; checkpoints in {work}")
        with reporter.bar("training", 1):
            on_step = _progress(reporter)
            if gpus > 1:
                torch.cuda.empty_cache()  # release the memory of the evaluation for the training processes
                train_on_ray(
                    source,
                    dtype,
                    rows.tokens,
                    training,
                    work,
                    on_step,
                    num_workers=gpus,
                    say=reporter.say,
                    teacher=teacher,
                    projections=projections,
                )
            else:
                student = load_on(source, dtype, place)
                held = None if teacher is None else load_teacher(teacher, dtype, place)
                train(student, rows.tokens, training, work, on_step, projections=projections, teacher=held)
        losses = recorded_losses(work)
        with new_folder(out) as aside:
            merged = training.train.merge(load_model(source, stored_dtype(source)), work)
            write_grouped(merged, tokenizer, provenance, aside, source, kept=kept)
            del merged
            if training.train.is_kept:
                shutil.copytree(work / training.train.file, aside / training.train.file)
            written = ModelSource(str(aside), trust_remote_code=trust_remote_code)
            after = perplexities("recovered", written, dtype, place, sets, reporter)
            perplexity = {text: _compared(*before[text], after[text]) for text in sets}
            result = {
                "num_rows": len(rows.tokens),
                "num_steps": len(losses),
                "train_loss": statistics.fmean(losses),
                "perplexity": perplexity,
                "wall_s": time.monotonic() - start,
            }
            recovery = {"config": how, "device": str(place), **result, "losses": _means(losses)}
            write_json(aside / SIDE_CAR, {**provenance, "recovery": recovery})
        shutil.rmtree(work, ignore_errors=True)
    also = f"; separate in {out / training.train.file}" if training.train.is_kept else ""
    reporter.say(f"wrote {out}: {training.train.name} of {len(losses)} steps merged{also}")
    for text, found in perplexity.items():
        share = found["recovered_share"]
        end = "" if share is None else f": {share:.1%} of the increase is recovered"
        reporter.say(
            f"perplexity on {text}: dense {found['dense']:.4f}, pruned {found['pruned']:.4f}, recovered "
            f"{found['recovered']:.4f}{end}"
        )
    return {"out": str(out), **result}


def _read_provenance(folder: Path) -> dict[str, Any]:
    """Read blockpruner.json of a checkpoint written by `prune`."""
    provenance = read_pruned_provenance(folder)
    if "recovery" in provenance:
        raise UserError(
            f"expected a checkpoint written by `blockpruner prune`, got {str(folder)!r}, which is already recovered."
        )
    return provenance


def _check_gpus(gpus: int, place: torch.device, config: RecoveryConfig) -> None:
    there = torch.cuda.device_count() if place.type == "cuda" else 0
    if gpus > there:
        raise UserError(f"expected `gpus` of at most {max(there, 1)} (what this machine has for {place}), got {gpus}.")
    if config.accumulation % gpus:
        raise UserError(
            f"expected `accumulation` to be a multiple of `gpus`, because the GPUs share the rows of a step, got "
            f"{config.accumulation} for {gpus} GPUs."
        )


def _training_dtype(requested: str, source: ModelSource, place: torch.device) -> tuple[str, str]:
    if requested == "float16":
        raise UserError("expected `dtype` bfloat16 or float32, got float16, in which small gradients become zero.")
    dtype, reason = resolve_dtype(requested, source, place)
    return ("bfloat16", "in float16 small gradients become zero") if dtype == "float16" else (dtype, reason)


def _before(
    work: Path,
    provenance: Mapping[str, Any],
    dense: ModelSource,
    pruned: ModelSource,
    dtype: str,
    place: torch.device,
    sets: dict[str, Tensor],
    reporter: Reporter,
) -> dict[str, tuple[float, float]]:
    """Return the perplexities of the dense and the pruned model, which are measured only once."""
    path = work / BEFORE
    model = fingerprint(pruned)
    keys = {text: f"{model} {dtype} {Windows(tokens, 0).fingerprint}" for text, tokens in sets.items()}
    known = read_back(path, dict[str, tuple[Perplexity, Perplexity]]) or {}
    new = {text: tokens for text, tokens in sets.items() if keys[text] not in known}
    if new:
        check_base(provenance, dense)
        of_dense = perplexities("dense", materialize(dense, dtype, reporter.say), dtype, place, new, reporter)
        of_pruned = perplexities("pruned", pruned, dtype, place, new, reporter)
        known |= {keys[text]: (of_dense[text], of_pruned[text]) for text in new}
        write_json(path, known)
    return {text: _numbers(*known[key]) for text, key in keys.items()}


def _numbers(dense: float | None, pruned: float | None) -> tuple[float, float]:
    """Restore NaN, which JSON does not have."""
    return math.nan if dense is None else dense, math.nan if pruned is None else pruned


def _compared(dense: float, pruned: float, recovered: float) -> dict[str, float | None]:
    nats = (math.log(value) for value in (dense, pruned, recovered))
    return {
        "dense": dense,
        "pruned": pruned,
        "recovered": recovered,
        "recovered_share": recovered_share(dense, pruned, recovered),
        "recovered_share_nats": recovered_share(*nats),
    }


def _means(losses: list[float]) -> list[float]:
    """Return means over NUM_MEANS parts of nearly equal length, or every loss of a shorter training."""
    num_parts = min(NUM_MEANS, len(losses))
    cuts = [part * len(losses) // num_parts for part in range(num_parts + 1)]
    return [statistics.fmean(losses[first:last]) for first, last in itertools.pairwise(cuts)]


def _progress(reporter: Reporter) -> Callable[[int, int, float], None]:
    """Return a function to call after each training step. It advances the bar, or prints a line from time to time."""
    num_before: int | None = None  # steps of earlier sessions

    def on_step(step: int, num_steps: int, loss: float) -> None:
        nonlocal num_before
        if num_before is None:
            num_before = step - 1
            if num_before:
                reporter.say(f"resuming after step {num_before} of {num_steps}")
        reporter.expect(num_steps - num_before, f"training, loss {loss:.3f}")
        reporter.advance(1)
        if not reporter.console.is_terminal and (step % LINE_STEPS == 0 or step == num_steps):
            reporter.say(f"step {step} of {num_steps}: loss {loss:.3f}, ETA {reporter.eta}")

    return on_step
