"""The door for models that are folders: what lies in one is judged from its files, before anything is scored."""

from __future__ import annotations

from os.path import lexists
from pathlib import Path

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.config_file import check_config, quantised
from blockpruner.engine.model.json_object import read_object
from blockpruner.engine.model.weight_files import files_left_out, has_weights, stored_tensors

ADAPTER = ("adapter_config.json", "adapter_model.")
"""How the names of an adapter's files begin."""
QUANTISED_BY = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quanto_qmap.json": "quanto",
}
"""Files that tools for quantisation leave beside the weights."""


def check_described(folder: Path) -> None:
    """Raise UserError for a folder whose files beside the weights say that it is no model to prune: no config or one
    that is damaged, an adapter, quantised weights."""
    adapters = sorted(file.name for file in folder.glob("adapter_*") if file.name.startswith(ADAPTER))
    if adapters:
        raise UserError(
            f"expected a model, got {str(folder)!r} with an adapter in it ({adapters[0]!r}), which transformers would "
            f"apply by itself; merge it first (PeftModel.merge_and_unload), or take the adapter's files out of the "
            f"folder if the weights hold it already."
        )
    if not lexists(folder / "config.json"):
        raise UserError(f"expected a checkpoint folder with a config.json, got {str(folder)!r} without one.")
    check_config(read_object(folder / "config.json"), str(folder))
    for name, method in QUANTISED_BY.items():
        if lexists(folder / name):
            raise UserError(quantised(str(folder), f"{method} (it has a {name})"))
    if lexists(folder / "generation_config.json"):
        read_object(folder / "generation_config.json")


def check_folder(folder: Path, *, needs_weights: bool = True) -> list[str]:
    """Raise UserError unless a folder holds a model that can be loaded, as far as its files tell. Costs the headers of
    the weight files. Returns notes for the user.

    needs_weights: False accepts a folder without any, of which only the config is read.
    """
    check_described(folder)
    if not needs_weights and not has_weights(folder):
        return []
    stored_tensors(folder)
    if left_out := files_left_out(folder):
        others = ", and others" if len(left_out) > 3 else ""
        return [f"not read in {str(folder)!r}: {', '.join(map(repr, left_out[:3]))}{others}"]
    return []
