"""The grouped layout: one decoder layer per kept attention, with a small modelling file next to the weights.

The folder loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. The flag is not needed
where this project is installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from blockpruner.engine.channels import CHANNELS_FILE, ChannelOrder
from blockpruner.engine.checkpoint.older import add_older_keys
from blockpruner.engine.checkpoint.provenance import WHOLE, Provenance
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import is_there, read_json
from blockpruner.engine.model.classes.pruned import name_base
from blockpruner.engine.model.tokenizer_files import write_tokenizer
from blockpruner.engine.sections import ModelSource

SIDE_CAR = "blockpruner.json"
"""File that records the removed blocks, the dense model and the run."""


def write_grouped(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    provenance: dict[str, Any],
    folder: Path,
    source: ModelSource | None = None,
    *,
    kept: ChannelOrder | None = None,
) -> None:
    """Write a model from `surgery.prune` into an existing, empty folder. source: see `write_tokenizer`. kept: the
    channels and heads of its narrower blocks."""
    name_base(pruned.config, type(pruned.base_model))
    if kept is not None and kept.channels:
        kept.write(folder / CHANNELS_FILE)
        provenance = {**provenance, "channels": kept.digest}
    write_checkpoint(pruned, tokenizer, provenance, folder, source)


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    provenance: dict[str, Any],
    folder: Path,
    source: ModelSource | None = None,
) -> None:
    """Write a model of any layout with its side-car file into an existing, empty folder. source: see
    `write_tokenizer`."""
    write_model(model, tokenizer, folder, source)
    (folder / SIDE_CAR).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, source: ModelSource | None = None
) -> None:
    """Write a model that transformers can save, with its tokenizer, into an existing folder. source: see
    `write_tokenizer`."""
    model.save_pretrained(folder)  # also copies the modelling file of classes registered with the Auto classes
    add_older_keys(folder)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, source)


def read_provenance(name: str, revision: str | None = None) -> dict[str, Any]:
    """Read the side-car file of a pruned checkpoint (a folder or hub id). Raises UserError if it is missing or
    unreadable."""
    try:
        file = Path(name) / SIDE_CAR if Path(name).is_dir() else Path(cached_file(name, SIDE_CAR, revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(f"expected a readable {SIDE_CAR} next to the weights of {name!r}, found none.") from error
    if not is_there(file):
        raise UserError(f"expected a readable {SIDE_CAR} next to the weights of {name!r}, found none.")
    values: dict[str, Any] = read_json(
        file, Provenance, "restore it, or prune again", called=f"the {SIDE_CAR} of {name!r}"
    )
    return values


def read_channels(folder: Path, provenance: Mapping[str, Any]) -> ChannelOrder | None:
    """Return which channels and heads of the dense model the narrower blocks of a pruned checkpoint have; None if it
    has no such blocks. Raises UserError if their file is missing or damaged."""
    if "channels" not in provenance:
        return None
    kept = ChannelOrder.read(folder / CHANNELS_FILE)
    if kept.digest != provenance["channels"]:
        raise UserError(f"{str(folder / CHANNELS_FILE)!r} is damaged; restore it, or prune again.")
    return kept


def read_pruned_provenance(folder: Path) -> dict[str, Any]:
    """Read blockpruner.json of a checkpoint from `prune` or `recover`. Raises UserError for any other folder."""
    if not (folder / SIDE_CAR).is_file():
        dense = (folder / "config.json").is_file()
        what = ", which holds a dense model; prune it first" if dense else f" without {SIDE_CAR}"
        raise UserError(f"expected a folder that `blockpruner prune` or `recover` wrote, got {str(folder)!r}{what}.")
    provenance = read_provenance(str(folder))
    if provenance.get("format") == WHOLE:
        raise UserError(
            f"expected the checkpoint of a text decoder, got {str(folder)!r}, a whole multimodal model of type "
            f"{provenance.get('multimodal')!r}; prune with `text_only` for this."
        )
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
