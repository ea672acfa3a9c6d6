"""Compensates a pruned checkpoint and writes the result as a checkpoint of the same form."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from blockpruner.cluster.opening import choose_device, open_scorer
from blockpruner.cluster.session import ray_session
from blockpruner.compensating.choosing import Split, fit_and_choose
from blockpruner.compensating.config import CompensateConfig
from blockpruner.compensating.replicas import Compensation
from blockpruner.compensating.work_folder import work_folder
from blockpruner.engine.blocks import Block, Mask, amount
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_channels, read_pruned_provenance, write_grouped
from blockpruner.engine.checkpoint.provenance import check_base
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.compensation.stages import check_fittable
from blockpruner.engine.compensation.surgery import put_changed, weights_of
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
    removed = Mask.of(Block.from_json(pair) for pair in provenance["removed"])
    kept = read_channels(folder, provenance)
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
    check_fittable(decoder)
    mask = Mask(removed.absent - decoder.shape.missing)
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
    split = Split.of(windows)
    say(
        f"{amount(mask.absent)} are absent; {len(split.fitted_on)} windows of {config.seq_len} tokens to fit on, "
        f"{len(split.held_out)} held out"
    )
    layers = decoder.architecture.layers
    assignment = Compensation(
        config, source, decoder, mask, dtype=dtype, device=device, data=split.both, kept=kept, say=say
    )
    before = load_model(pruned, stored_dtype(pruned))
    how = {
        **config.part(Fit).to_json(),
        "dtype": dtype,
        "device": device,
        "threads": assignment.threads,
        "text": windows.fingerprint,
        "model": fingerprint(pruned),
        "dense": fingerprint(source),
    }
    with work_folder(out, how) as work:
        with open_scorer(config, assignment, say, str(out)) as opened:
            found = fit_and_choose(
                config,
                opened.scorer,
                lambda stages: weights_of(before, stages, layers),
                split,
                assignment.cost,
                reporter,
                work.store,
            )
        compensation = {**found.to_json(windows), "dtype": dtype}
        with new_folder(out) as aside:
            put_changed(before, found.stages, layers, found.changed)
            write_grouped(before, tokenizer, provenance, aside, pruned, kept=kept)
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


def _read_provenance(folder: Path) -> dict[str, Any]:
    provenance = read_pruned_provenance(folder)
    for key, what in (("recovery", "recovered"), ("compensation", "compensated")):
        if key in provenance:
            raise UserError(
                f"expected a checkpoint written by `blockpruner prune`, got {str(folder)!r}, which is already {what}."
            )
    return provenance
