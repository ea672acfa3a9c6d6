"""Compensates a pruned checkpoint and writes the result as a checkpoint of the same form."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockpruner.cluster.opening import choose_device, open_scorer
from blockpruner.cluster.session import ray_session
from blockpruner.compensating.config import CompensateConfig
from blockpruner.compensating.replicas import Compensation
from blockpruner.compensating.work_folder import WorkFolder, work_folder
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_pruned_provenance, write_grouped
from blockpruner.engine.checkpoint.provenance import check_base
from blockpruner.engine.compensation.config import RIDGES, Fit
from blockpruner.engine.compensation.fitting import Fitting, Trial, parts_of
from blockpruner.engine.compensation.projections import Weights
from blockpruner.engine.compensation.replica import StagesUnit
from blockpruner.engine.compensation.surgery import put_changed, weights_of
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.model.loading import (
    check_positions,
    load_model,
    load_tokenizer,
    materialize,
    meta_model,
    resolve_dtype,
    stored_dtype,
)
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.text.tokens import check_ids
from blockpruner.evaluating.perplexities import perplexities, text_windows
from blockpruner.files import check_new_folder, new_folder, write_json
from blockpruner.showing.console import Reporter

HELD_OUT_EVERY = 8
"""One of so many calibration windows is held out, to choose by."""


def compensate_checkpoint(config: CompensateConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Compensate the checkpoint in `folder` and write the result to the new folder `out`.

    Until the fit is complete, `out` with `.work` appended holds the fitted weights, and the same call resumes from
    there. Returns what `compensate --json` prints.
    """
    with ExitStack() as stack:
        if config.address is not None:
            stack.enter_context(ray_session(config.address))
        return _compensate(config, out, reporter)


def _compensate(config: CompensateConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    start, say = time.monotonic(), reporter.say
    folder = config.folder
    provenance = _read_provenance(folder)
    check_new_folder(out)
    mask = Mask.of(Block.from_json(pair) for pair in provenance["removed"])
    dense = ModelSource(
        config.dense or provenance["base_model"],
        None if config.dense else provenance["revision"],
        config.trust_remote_code,
    )
    check_base(provenance, dense)
    device = choose_device(config, config.device, say)
    dtype, reason = resolve_dtype(config.dtype, dense, torch.device(device))
    say(f"dense model {dense.name} in {dtype} ({reason}) on {device}")
    source = materialize(dense, dtype, say)
    pruned = materialize(ModelSource(str(folder), trust_remote_code=config.trust_remote_code), dtype)
    decoder = Decoder(meta_model(source, dtype))
    model_config = decoder.model.config
    check_positions(model_config, config.seq_len)
    tokenizer = load_tokenizer(pruned)
    windows = calibration_windows(config, tokenizer, model_config.model_type)
    check_ids(windows.tokens, decoder.model.get_input_embeddings().num_embeddings)
    for note in windows.notes:
        say(f"note: {note}")
    sets = text_windows(
        config.perplexity,
        tokenizer,
        model_config,
        seq_len=config.seq_len,
        text_column=config.text_column,
        chat_template=config.chat_template,
        bos=config.bos,
        num_windows=config.perplexity_windows,
    )
    fitted_on, held_out = _split(windows.tokens)
    say(
        f"{len(mask.absent)} blocks are absent; {len(fitted_on)} windows of {config.seq_len} tokens to fit on, "
        f"{len(held_out)} held out"
    )
    trials, layers = trials_of(config), decoder.architecture.layers
    assignment = Compensation(
        config, source, decoder.shape, mask, dtype=dtype, device=device, data=torch.cat([fitted_on, held_out]),
        num_trials=len(trials), say=say,
    )  # fmt: skip
    before = load_model(pruned, stored_dtype(pruned))
    how = {
        "method": config.method.name,
        "ridges": [trial.ridge for trial in trials],
        "dtype": dtype,
        "device": device,
        "threads": assignment.threads,
        "text": windows.fingerprint,
        "model": fingerprint(pruned),
    }
    with work_folder(out, how) as work:
        with open_scorer(config, assignment, say) as opened:
            stages, reasons = next(iter(opened.scorer.run([StagesUnit()]))).value  # type: ignore[union-attr]
            for reason, blocks in _by_reason(reasons).items():
                say(f"note: {blocks} cannot be fitted: {reason}")
            fitting = Fitting(
                opened.scorer, stages, weights_of(before, stages, layers), trials, parts_of(len(fitted_on)),
                assignment.flops,
            )  # fmt: skip
            ranges = [(len(fitted_on) + first, len(fitted_on) + stop) for first, stop in parts_of(len(held_out))]
            found = fit_and_choose(fitting, work, ranges, config.seq_len, reporter)
        compensation = {
            "method": found.trial.method.name if found.trial else None,
            "ridge": found.trial.ridge if found.trial else None,
            "num_tokens": fitted_on.numel(),
            "num_held_out_tokens": held_out.numel(),
            "calibration": windows.fingerprint,
            "nll": found.nlls,
            "dtype": dtype,
            "not_fitted": {str(block): reason for block, reason in reasons.items()},
        }
        with new_folder(out) as aside:
            put_changed(before, stages, layers, found.changed)
            write_grouped(before, tokenizer, provenance, aside, pruned)
            del before
            written = ModelSource(str(aside), trust_remote_code=config.trust_remote_code)
            place = torch.device(device)
            perplexity: dict[str, dict[str, float]] = {text: {} for text in sets}
            if sets:
                models = {"dense": source, "pruned": pruned, "compensated": written}
                for which, one in models.items():
                    for text, value in perplexities(which, one, dtype, place, sets, reporter).items():
                        perplexity[text][which] = value
            result = {**compensation, "seconds": time.monotonic() - start, "perplexity": perplexity}
            write_json(aside / SIDE_CAR, {**provenance, "compensation": result})
        shutil.rmtree(work.path, ignore_errors=True)
    say(f"wrote {out}: {found.told}")
    for text, values in perplexity.items():
        numbers = ", ".join(f"{which} {value:.4f}" for which, value in values.items())
        say(f"perplexity on {text}: {numbers}")
    keys = ("method", "ridge", "num_tokens", "seconds", "perplexity")
    return {"out": str(out), **{key: result[key] for key in keys}}


@dataclass(frozen=True)
class Found:
    """The trial that does best on the held-out windows."""

    trial: Trial | None
    """None: each one makes them worse, so nothing is changed."""
    changed: Changed
    nlls: dict[str, float | None]
    """Mean token NLL on the held-out windows, by the trial's name; `pruned` is that of the unchanged weights."""

    @property
    def told(self) -> str:
        before = self.nlls["pruned"]
        if self.trial is None:
            return f"nothing is changed, since no fit lowers the held-out loss ({before:.4f} nats)"
        return f"{self.trial}; held-out loss {before:.4f} nats before, {self.nlls[str(self.trial)]:.4f} after"


def fit_and_choose(
    fitting: Fitting, work: WorkFolder, held_out: Sequence[tuple[int, int]], seq_len: int, reporter: Reporter
) -> Found:
    """Fit all trials, and choose the one with the lowest loss on held-out windows, or none."""
    known = work.known()
    changes: list[dict[Block, Weights]] = [{} for _ in fitting.trials]
    if known:
        reporter.say(f"resuming after {len(known)} of {len(fitting.stages)} fitted stages")
    with reporter.bar("fitting", len(fitting.stages) + len(fitting.trials) + 1):
        for stage, fitted in fitting.fit(known):
            if stage.number not in known:
                work.save(stage.number, fitted)
            for all_, some in zip(changes, fitted, strict=True):
                all_ |= some
            reporter.advance(1)
            if not reporter.console.is_terminal:
                reporter.say(f"{' and '.join(map(str, stage.blocks))} fitted, ETA {reporter.eta}")
        num_tokens = sum(stop - first for first, stop in held_out) * (seq_len - 1)

        def nll(changed: Changed, name: str) -> float:
            reporter.advance(1)
            return math.fsum(fitting.losses(changed, name, held_out)) / num_tokens

        nlls = {"pruned": nll({}, "the pruned model")}
        for trial, changed in zip(fitting.trials, changes, strict=True):
            nlls[str(trial)] = nll(changed, str(trial))
    for name, value in nlls.items():
        reporter.say(f"held-out loss of {name}: {value:.4f} nats")
    finite = [(value, number) for number, value in enumerate(nlls.values()) if math.isfinite(value)]
    best = min(finite)[1] if finite else 0
    shown = {name: value if math.isfinite(value) else None for name, value in nlls.items()}
    return Found(None, {}, shown) if best == 0 else Found(fitting.trials[best - 1], changes[best - 1], shown)


def trials_of(fit: Fit) -> list[Trial]:
    """Return the ways to fit that are compared."""
    ridges = RIDGES if fit.ridge is None else (fit.ridge,)
    return [Trial(method, ridge) for method in fit.method.candidates for ridge in ridges]


def _split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Split windows [num_windows, seq_len] into those to fit on and those held out, which are spread evenly."""
    if len(windows) < 2:
        raise UserError(
            "expected at least 2 calibration windows, one to fit on and one to choose by, got 1; raise `num_samples`, "
            "or lower `seq_len`."
        )
    every = min(HELD_OUT_EVERY, len(windows))
    is_held_out = torch.arange(len(windows)) % every == every // 2
    return windows[~is_held_out], windows[is_held_out]


def _by_reason(reasons: Mapping[Block, str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for block, reason in reasons.items():
        found.setdefault(reason, []).append(str(block))
    return {reason: ", ".join(blocks) for reason, blocks in found.items()}


def _read_provenance(folder: Path) -> dict[str, Any]:
    provenance = read_pruned_provenance(folder)
    for key, what in (("recovery", "recovered"), ("compensation", "compensated")):
        if key in provenance:
            raise UserError(
                f"expected a checkpoint written by `blockpruner prune`, got {str(folder)!r}, which is already {what}."
            )
    return provenance
