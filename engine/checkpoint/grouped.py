"""The grouped layout: one decoder layer per kept attention, a small modelling file beside the weights.

The folder loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` where this project is not
installed, and without the flag where it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.pruned_classes import name_base

SIDE_CAR = "blockpruner.json"
"""What was removed, from what, and by which run."""


def write_grouped(
    pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, provenance: dict[str, Any], folder: Path
) -> None:
    """Write a model that `surgery.prune` made into an existing, empty folder."""
    name_base(pruned.config, type(pruned.base_model))
    write_checkpoint(pruned, tokenizer, provenance, folder)


def write_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, provenance: dict[str, Any], folder: Path
) -> None:
    """Write a model of any layout with its side-car into an existing, empty folder."""
    model.save_pretrained(folder)  # also copies the modelling file of classes that are registered for the Auto classes
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / SIDE_CAR).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def read_provenance(name: str, revision: str | None = None) -> dict[str, Any]:
    """The side-car of a pruned checkpoint, a folder or a hub id. Raises UserError if there is none that can be read."""
    try:
        file = cached_file(name, SIDE_CAR, revision=revision)
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected {SIDE_CAR} beside the weights of {name!r}, found none that can be read.") from error
    if not isinstance(values, dict):
        raise UserError(f"expected an object in {SIDE_CAR} of {name!r}, got {type(values).__name__}.")
    return values


def read_pruned_provenance(folder: Path) -> dict[str, Any]:
    """blockpruner.json of a checkpoint that `prune` or `recover` wrote. Raises UserError for any other folder."""
    if not (folder / SIDE_CAR).is_file():
        dense = (folder / "config.json").is_file()
        what = ", which holds a dense model; prune it first" if dense else f" without {SIDE_CAR}"
        raise UserError(f"expected a folder that `blockpruner prune` or `recover` wrote, got {str(folder)!r}{what}.")
    provenance = read_provenance(str(folder))
    if "export" not in provenance and (form := provenance.get("format", "grouped")) != "grouped":
        raise UserError(
            f"expected a checkpoint as `blockpruner prune` writes it, got {str(folder)!r}, which has the format "
            f"{form!r}."
        )
    needed = {"format", "base_model", "revision", "dtype", "removed", "ratio", "num_parameters", "blockpruner"}
    if missing := {*needed, "num_parameters_dense"} - provenance.keys():
        raise UserError(
            f"expected {', '.join(sorted(missing))} in the {SIDE_CAR} of {str(folder)!r}, which another version of "
            f"blockpruner wrote; prune again."
        )
    if "export" in provenance:
        raise UserError(
            f"expected a folder that `blockpruner prune` or `recover` wrote, got {str(folder)!r}, an export in the "
            f"{provenance['format']} format; name the folder that it was made from."
        )
    return provenance
