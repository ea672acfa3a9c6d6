"""A pruned checkpoint to the form that a runtime loads."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blockpruner.engine.checkpoint.assembled import check_same
from blockpruner.engine.checkpoint.card import licence_of, model_card
from blockpruner.engine.checkpoint.deci import deci_model, why_not_deci
from blockpruner.engine.checkpoint.gguf import from_checkpoint, read_base, write_gguf
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_pruned_provenance, write_grouped
from blockpruner.engine.checkpoint.remainder import Remainder, what_is_left
from blockpruner.engine.checkpoint.vanilla import vanilla_model
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import (
    ModelSource,
    fingerprint,
    gguf_file,
    load_model,
    load_tokenizer,
    stored_dtype,
)
from blockpruner.files import check_new_folder, new_folder, write_json
from blockpruner.showing.console import Reporter
from blockpruner.showing.measurements import tabulate_evaluations

GGUF_FILE = "model.gguf"
EXACT, ROUNDED = 1e-3, 0.1
"""Standard deviations of the logits by which an export may differ: where a wrong pairing of blocks may show in little,
and where only rounding differs."""


def export_model(
    folder: Path,
    out: Path,
    reporter: Reporter,
    *,
    style: str = "auto",
    base: str | None = None,
    gguf_type: str | None = None,
    evaluations: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint in `folder`, which `prune` or `recover` wrote, to the new folder `out` with a model card.

    style: deci, grouped, vanilla, gguf, or auto for deci or else grouped; base: GGUF file of the dense model;
    gguf_type: convert the checkpoint's own weights to f32, f16 or q8_0 instead. What was written is loaded again and
    compared with the pruned model, except for GGUF, which only llama.cpp runs (`serve-check`).

    Returns what `export --json` prints.
    """
    if style != "gguf" and (base is not None or gguf_type is not None):
        raise UserError(f"expected --base and --gguf-type with --format gguf only, got --format {style}.")
    provenance = read_pruned_provenance(folder)
    check_new_folder(out)
    scores = tabulate_evaluations(evaluations) if evaluations else None
    source = ModelSource(str(folder), trust_remote_code=trust_remote_code)
    dtype = stored_dtype(source)
    pruned = load_model(source, dtype)
    left = None if style == "grouped" else _what_is_left(pruned, style)
    if style == "auto":
        style = "deci" if left is not None and why_not_deci(left) is None else "grouped"
    reporter.say(f"exporting {folder} in the {style} format")
    with new_folder(out) as aside:
        if style == "gguf":
            assert left is not None
            notes = _write_gguf(left, provenance, source, base, gguf_type, aside)
        elif style == "grouped":
            write_grouped(pruned, load_tokenizer(source), {}, aside)
            check_same(load_model(ModelSource(str(aside), trust_remote_code=trust_remote_code), dtype), pruned, ROUNDED)
            notes = []
        else:
            assert left is not None
            notes = _write_folder(style, left, pruned, source, dtype, aside)
        num_parameters = provenance["num_parameters"]
        exported = {"from": str(folder.resolve()), "fingerprint": fingerprint(source), "notes": notes}
        provenance = {**provenance, "format": style, "export": exported}
        write_json(aside / SIDE_CAR, provenance)
        card = model_card(
            out.name,
            provenance,
            licence=licence_of(provenance["base_model"], gguf_file(provenance["base_model"])),
            notes=notes,
            command=_command(folder, out, style, base, gguf_type),
            scores=None if scores is None else (scores.caption, scores.header, scores.rows),
        )
        (aside / "README.md").write_text(card, encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in aside.iterdir())
    for note in notes:
        reporter.say(f"note: {note}")
    reporter.say(f"wrote {out}: {num_bytes / 2**20:,.1f} MiB")
    return {
        "out": str(out),
        "format": style,
        "num_bytes": num_bytes,
        "num_parameters": num_parameters,
        "notes": notes,
    }


def _what_is_left(pruned: PreTrainedModel, style: str) -> Remainder | None:
    """None where only the grouped format will do."""
    try:
        return what_is_left(pruned)
    except UserError:
        if style == "auto":
            return None
        raise


def _write_folder(
    style: str, left: Remainder, pruned: PreTrainedModel, source: ModelSource, dtype: str, folder: Path
) -> list[str]:
    if style == "deci":
        model, notes = deci_model(left)
        _save(model, pruned, source, folder)
        check_same(load_model(ModelSource(str(folder)), dtype), pruned, ROUNDED)
        return notes
    # Blocks of different layers are paired where that changes nothing.
    for sequential in (True, False):
        try:
            model, notes = vanilla_model(left, sequential=sequential)
            _save(model, pruned, source, folder)
            check_same(load_model(ModelSource(str(folder)), dtype), pruned, EXACT)
            return notes
        except UserError:
            if not sequential:
                raise
    raise AssertionError


def _save(model: PreTrainedModel, pruned: PreTrainedModel, source: ModelSource, folder: Path) -> None:
    model.generation_config = pruned.generation_config
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def _write_gguf(
    left: Remainder,
    provenance: dict[str, Any],
    source: ModelSource,
    base: str | None,
    gguf_type: str | None,
    folder: Path,
) -> list[str]:
    if base is None and gguf_type is None:
        raise UserError(
            "expected --base FILE.gguf, a GGUF of the dense model whose tensors are copied, or --gguf-type f32, f16 or "
            "q8_0, to convert the checkpoint's own weights; got neither."
        )
    if "recovery" in provenance and gguf_type is None:
        raise UserError(
            "expected --gguf-type f32, f16 or q8_0 for a recovered checkpoint, got --base alone: the GGUF of the dense "
            "model does not have the weights that recover trained."
        )
    content = None
    if base is not None:
        file = gguf_file(base)
        if file is None:
            raise UserError(f"expected a .gguf file for --base, got {base!r}.")
        content = read_base(file, left)
    if gguf_type is not None:
        tokenizer = None if content is not None else load_tokenizer(source)
        content = from_checkpoint(left, tokenizer, gguf_type, content)
    assert content is not None
    return write_gguf(content, left, folder / GGUF_FILE)


def _command(folder: Path, out: Path, style: str, base: str | None, gguf_type: str | None) -> str:
    words = ["blockpruner", "export", folder.name, "--format", style]
    words += ["--base", Path(base).name] if base is not None else []
    words += ["--gguf-type", gguf_type] if gguf_type is not None else []
    return shlex.join([*words, "--out", out.name])
