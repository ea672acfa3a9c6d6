"""Exports a pruned checkpoint to a format that a runtime can load."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from blockpruner.engine.checkpoint.card import licence_of, model_card
from blockpruner.engine.checkpoint.format import Format, Pruned
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_pruned_provenance
from blockpruner.engine.model.from_gguf.files import gguf_file
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.model.loading import load_model, stored_dtype
from blockpruner.engine.sections import ModelSource
from blockpruner.exporting.config import ExportConfig
from blockpruner.files import check_new_folder, new_folder, write_json
from blockpruner.showing.console import Reporter
from blockpruner.showing.measurements import tabulate_evaluations


def export_model(config: ExportConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Export the checkpoint in `folder`, written by `prune` or `recover`, to the new folder `out` with a model card.

    The export is loaded again and compared with the pruned model, except for GGUF, which only llama.cpp can run
    (`serve-check`). Returns what `export --json` prints.
    """
    folder = config.folder
    provenance = read_pruned_provenance(folder)
    config.format.check(provenance)
    check_new_folder(out)
    scores = tabulate_evaluations(config.evaluation) if config.evaluation else None
    source = ModelSource(str(folder), trust_remote_code=config.trust_remote_code)
    dtype = stored_dtype(source)
    pruned = Pruned(load_model(source, dtype), source, dtype, provenance)
    form = config.format.fitting(pruned)
    reporter.say(f"exporting {folder} in the {form.name} format")
    with new_folder(out) as aside:
        notes = form.write(pruned, aside)
        exported = {"from": str(folder.resolve()), "fingerprint": fingerprint(source), "notes": notes}
        provenance = {**provenance, "format": form.name, "export": exported}
        write_json(aside / SIDE_CAR, provenance)
        card = model_card(
            out.name,
            form,
            provenance,
            licence=licence_of(provenance["base_model"], gguf_file(provenance["base_model"])),
            notes=notes,
            command=_command(folder, out, form),
            scores=None if scores is None else (scores.caption, scores.header, scores.rows),
        )
        (aside / "README.md").write_text(card, encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in aside.iterdir())
    for note in notes:
        reporter.say(f"note: {note}")
    reporter.say(f"wrote {out}: {num_bytes / 2**20:,.1f} MiB")
    return {
        "out": str(out),
        "format": form.name,
        "num_bytes": num_bytes,
        "num_parameters": provenance["num_parameters"],
        "notes": notes,
    }


def _command(folder: Path, out: Path, form: Format) -> str:
    words = ["blockpruner", "export", folder.name, "--format", form.name]
    for name, value in form.to_json().items():
        words += [f"--{name.replace('_', '-')}", Path(value).name] if value is not None else []
    return shlex.join([*words, "--out", out.name])
