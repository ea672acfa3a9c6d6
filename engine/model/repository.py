"""The door for models on the Hugging Face hub: the names of its files tell what a repository holds, before they are
fetched."""

from __future__ import annotations

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.config_file import quantised
from blockpruner.engine.model.folder import ADAPTER, QUANTISED_BY
from blockpruner.engine.model.hub import file_names
from blockpruner.engine.model.weight_files import INDEX, SINGLE
from blockpruner.engine.sections import ModelSource


def check_repository(source: ModelSource, *, needs_weights: bool = True) -> None:
    """Raise UserError for a hub id whose files are not those of a model to prune. Does nothing if the hub cannot be
    asked: what is in the cache is judged when it is loaded.

    needs_weights: False if only the config is read.
    """
    found = file_names(source)
    if found is None:
        return
    names = sorted(name for name in found if "/" not in name)
    if adapters := [name for name in names if name.startswith(ADAPTER)]:
        raise UserError(
            f"expected a model, got {source.name!r} with an adapter in it ({adapters[0]!r}), which transformers would "
            f"apply by itself; merge it first (PeftModel.merge_and_unload), save the result, and give its folder."
        )
    if "config.json" not in names:
        ggufs = [name for name in found if name.lower().endswith(".gguf")]
        way = f"; download one of its GGUF files ({ggufs[0]!r}) and give its path" if ggufs else ""
        raise UserError(f"expected a model with a config.json, got {source.name!r} without one{way}.")
    for name, method in QUANTISED_BY.items():
        if name in names:
            raise UserError(quantised(source.name, f"{method} (it has a {name})"))
    if needs_weights and SINGLE not in names and INDEX not in names:
        is_pickled = any(name.endswith((".bin", ".pth", ".pt")) for name in names)
        what = "only pickled weights" if is_pickled else "none"
        then = "; load the model with transformers, save it, and give its folder" if is_pickled else ""
        raise UserError(f"expected weights as {SINGLE} or with {INDEX} in {source.name!r}, found {what}{then}.")
