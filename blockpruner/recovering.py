"""A pruned checkpoint to a recovered one: train adapters, merge them, say how much of the perplexity came back."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.cluster.training import train_on_ray
from blockpruner.engine.calibration import Windows, cut_windows, evaluation_windows
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_pruned_provenance, write_grouped
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.model.loading import (
    ModelSource,
    check_positions,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    materialize,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)
from blockpruner.engine.recovery import (
    RecoveryConfig,
    draw_rows,
    latest_checkpoint,
    merge,
    recorded_losses,
    recovered_share,
    train,
)
from blockpruner.engine.scoring.scoring import full_memory_ends
from blockpruner.files import check_new_folder, lock_folder, new_folder, write_json
from blockpruner.showing.console import Reporter

REST = "rest"
"""Name, as a text to evaluate on, of the rows that were not drawn."""
NUM_MEANS = 10
"""The losses that a checkpoint's provenance tells: means over so many equal parts of the training."""
LINE_STEPS = 20
"""Without a terminal, progress is a line after so many steps."""


def recover_model(
    folder: Path,
    out: Path,
    reporter: Reporter,
    *,
    config: RecoveryConfig,
    data: str = "alpaca",
    text_column: str = "text",
    num_rows: int = 8000,
    texts: list[str],
    num_windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    gpus: int = 1,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Train adapters for the pruned checkpoint in `folder`. Write it, with them merged, to `out`, which must not exist.

    Until that is done, `out` with `.work` appended holds the training, and the same call goes on from there. The
    perplexities of the dense model, of the pruned one and of what was written are measured on `texts` in windows of
    `config.seq_len`, all in the dtype of the training. Returns what `recover --json` prints.
    """
    start = time.monotonic()
    provenance = _read_provenance(folder)
    check_new_folder(out)
    place = resolve_device(device)
    if gpus > 1:
        _check_gpus(gpus, place, config)
    source = materialize(ModelSource(str(folder), trust_remote_code=trust_remote_code), dtype)
    dtype, reason = _training_dtype(dtype, source, place)
    check_positions(load_config(source), config.seq_len)
    tokenizer = load_tokenizer(source)
    rows = draw_rows(
        data, tokenizer, num_rows=num_rows, seq_len=config.seq_len, seed=config.seed, text_column=text_column
    )
    for note in rows.notes:
        reporter.say(f"note: {note}")
    sets = {}
    for text in texts:
        if text == REST and not rows.rest:
            raise UserError(f"expected rows of {data} that are not trained on for --perplexity rest; lower --num-rows.")
        if text == REST:
            windows = cut_windows("\n\n".join(rows.rest), tokenizer, config.seq_len, f"the rest of {data}")
        else:
            windows = evaluation_windows(text, tokenizer, seq_len=config.seq_len, text_column=text_column).tokens
        sets[text] = windows[:num_windows]
    drawn = {"data": data, "num_rows": num_rows, "text_column": text_column}
    how = {**asdict(config), **drawn, "dtype": dtype, "gpus": gpus}
    with _work_folder(out, {**how, "model": fingerprint(source), "rows": rows.fingerprint}) as work:
        dense = ModelSource(provenance["base_model"], provenance["revision"], trust_remote_code)
        before = _before(work, dense, source, dtype, place, sets, reporter)
        reporter.say(f"training on {len(rows.tokens)} rows in {dtype} ({reason}) on {place}; checkpoints in {work}")
        with reporter.bar("training", 1):
            on_step = _progress(reporter)
            if gpus > 1:
                torch.cuda.empty_cache()  # what the evaluation leaves to this process, the others may need
                train_on_ray(source, dtype, rows.tokens, config, work, on_step, num_workers=gpus)
            else:
                train(_load(source, dtype, place), rows.tokens, config, work, on_step)
        losses = recorded_losses(work)
        with new_folder(out) as aside:
            merged = merge(load_model(source, stored_dtype(source)), work / "adapter")
            write_grouped(merged, tokenizer, provenance, aside)
            del merged
            shutil.copytree(work / "adapter", aside / "adapter")
            written = ModelSource(str(aside), trust_remote_code=trust_remote_code)
            after = _perplexities("recovered", written, dtype, place, sets, reporter)
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
    reporter.say(f"wrote {out}: adapters of {len(losses)} steps merged; by themselves they are in {out / 'adapter'}")
    for text, found in perplexity.items():
        share = found["recovered_share"]
        end = "" if share is None else f": {share:.1%} of the increase is recovered"
        reporter.say(
            f"perplexity on {text}: dense {found['dense']:.4f}, pruned {found['pruned']:.4f}, recovered "
            f"{found['recovered']:.4f}{end}"
        )
    return {"out": str(out), **result}


def _read_provenance(folder: Path) -> dict[str, Any]:
    """blockpruner.json of a checkpoint that `prune` wrote."""
    provenance = read_pruned_provenance(folder)
    if "recovery" in provenance:
        raise UserError(
            f"expected a checkpoint as `blockpruner prune` writes it, got {str(folder)!r}, which is recovered already."
        )
    return provenance


def _check_gpus(gpus: int, place: torch.device, config: RecoveryConfig) -> None:
    there = torch.cuda.device_count() if place.type == "cuda" else 0
    if gpus > there:
        raise UserError(f"expected --gpus of at most {max(there, 1)} (what this machine has for {place}), got {gpus}.")
    if config.accumulation % gpus:
        raise UserError(
            f"expected --accumulation to be a multiple of --gpus, which share the rows of a step, got "
            f"{config.accumulation} for {gpus} GPUs."
        )


def _training_dtype(requested: str, source: ModelSource, place: torch.device) -> tuple[str, str]:
    if requested == "float16":
        raise UserError("expected --dtype bfloat16 or float32, got float16, in which small gradients become zero.")
    dtype, reason = resolve_dtype(requested, source, place)
    return ("bfloat16", "in float16 small gradients become zero") if dtype == "float16" else (dtype, reason)


@contextmanager
def _work_folder(out: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Where a training goes on after a stop. Raises UserError if it is one with another config."""
    work = out.with_name(f"{out.name}.work")
    lock = lock_folder(work)
    try:
        path = work / "config.json"
        if latest_checkpoint(work) is not None:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            different = [
                f"{key} was {recorded[key]!r}, now {config[key]!r}" for key in config if recorded[key] != config[key]
            ]
            if different:
                raise UserError(
                    f"{str(work)!r} holds a training with another config: {'; '.join(different)}. Use the same, choose "
                    f"another --out, or delete that folder."
                )
        write_json(path, config)
        yield work
    except UserError:
        if not any(work.glob("checkpoint-*")) and not (work / "before.json").exists():
            shutil.rmtree(work, ignore_errors=True)  # nothing was found out
        raise
    finally:
        lock.release()


def _before(
    work: Path,
    dense: ModelSource,
    pruned: ModelSource,
    dtype: str,
    place: torch.device,
    sets: dict[str, Tensor],
    reporter: Reporter,
) -> dict[str, tuple[float, float]]:
    """Perplexities of the dense and of the pruned model, measured once."""
    path = work / "before.json"
    keys = {text: f"{fingerprint(pruned)} {dtype} {Windows(tokens, 0).fingerprint}" for text, tokens in sets.items()}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    new = {text: tokens for text, tokens in sets.items() if keys[text] not in known}
    if new:
        of_dense = _perplexities("dense", materialize(dense, dtype, reporter.say), dtype, place, new, reporter)
        of_pruned = _perplexities("pruned", pruned, dtype, place, new, reporter)
        known |= {keys[text]: [of_dense[text], of_pruned[text]] for text in new}
        write_json(path, known)
    return {text: _numbers(*known[key]) for text, key in keys.items()}


def _numbers(dense: float | None, pruned: float | None) -> tuple[float, float]:
    """As they were before they went to JSON, which has no NaN."""
    return math.nan if dense is None else dense, math.nan if pruned is None else pruned


def _perplexities(
    which: str, source: ModelSource, dtype: str, place: torch.device, sets: dict[str, Tensor], reporter: Reporter
) -> dict[str, float]:
    values: dict[str, float] = {}
    model = _load(source, dtype, place) if sets else None
    for text, windows in sets.items():
        with reporter.bar(f"{which}: perplexity on {text}", len(windows)):
            values[text] = evaluate_perplexity(model, windows, lambda: reporter.advance(1)).value
        reporter.say(f"{which}: perplexity {values[text]:.4f} on {text} ({len(windows)} windows of {windows.shape[1]})")
    return values


def _load(source: ModelSource, dtype: str, place: torch.device) -> PreTrainedModel:
    with full_memory_ends("before the model is loaded", "other programs may use it; free it."):
        return load_model(source, dtype, place)


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
    """Means over NUM_MEANS parts of as equal length as can be; shorter trainings give each loss."""
    num_parts = min(NUM_MEANS, len(losses))
    cuts = [part * len(losses) // num_parts for part in range(num_parts + 1)]
    return [statistics.fmean(losses[first:last]) for first, last in itertools.pairwise(cuts)]


def _progress(reporter: Reporter) -> Callable[[int, int, float], None]:
    """What to do after each step of the training: advance the bar; where there is none, a line now and then."""
    num_before: int | None = None  # steps of earlier sessions

    def on_step(step: int, num_steps: int, loss: float) -> None:
        nonlocal num_before
        if num_before is None:
            num_before = step - 1
            if num_before:
                reporter.say(f"going on after step {num_before} of {num_steps}")
        reporter.expect(num_steps - num_before, f"training, loss {loss:.3f}")
        reporter.advance(1)
        if not reporter.console.is_terminal and (step % LINE_STEPS == 0 or step == num_steps):
            reporter.say(f"step {step} of {num_steps}: loss {loss:.3f}, ETA {reporter.eta}")

    return on_step
