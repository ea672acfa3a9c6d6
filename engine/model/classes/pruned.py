"""The classes of a pruned model, defined in a short modelling file that subclasses the architecture's own classes.

The file (`modelling_text.py`) is imported here, and saved with the weights of every checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typing_extensions import TypedDict

from blockpruner.engine.blocks import Kind
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import MAX_LAYER, Count, Size, misfit, parse_json, read_bytes
from blockpruner.engine.model.architectures import PRUNED_PREFIX, architecture_of
from blockpruner.engine.model.cache import cache_dir
from blockpruner.engine.model.classes.modelling_text import modelling_source
from blockpruner.engine.model.rows import Architecture

PACKAGE = "blockpruned_modules"
"""Importable package that holds the modelling files in use."""


_Widths = dict[Annotated[str, Field(pattern=r"^\d{1,7}$")], Size]
WIDTHS = {"mlp_widths": Kind.MLP, "kept_kv_heads": Kind.MHA}
"""Values of a pruned config: the widths of blocks that lack some of their groups, by source layer."""


class _Group(TypedDict):
    pre: list[Count]
    attention: Count
    mlp: bool
    post: list[Count]
    empty: NotRequired[list[Count]]
    """Layers of `pre` and `post` without an MLP, of which only what a layer does beside its blocks is left."""


class _PrunedValues(TypedDict):
    """What a pruned config has beside the values of its source."""

    auto_map: dict[str, str]
    block_groups: list[_Group]
    source_num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYER)]
    source_lists: dict[str, list[Any] | dict[str, Any] | int]
    mlp_widths: NotRequired[_Widths | None]
    kept_kv_heads: NotRequired[_Widths | None]


OURS = frozenset((
    "model_type", "architectures", "auto_map", "block_groups", "source_num_hidden_layers", "source_lists", *WIDTHS,
))  # fmt: skip
"""Values of a pruned config that are not those of its source."""


@dataclass(frozen=True)
class PrunedClasses:
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]


def pruned_classes(model: PreTrainedModel, architecture: Architecture, *, is_narrower: bool = False) -> PrunedClasses:
    """Import the classes of `model`'s pruned form and register them with the Auto classes. Their checkpoints then load
    without `trust_remote_code` in this process, and `save_pretrained` copies the modelling file.

    is_narrower: whether MLPs of the pruned form have fewer channels.
    """
    source_files = _remote_code_files(model)
    source = modelling_source(model, architecture, is_remote=bool(source_files), is_narrower=is_narrower)
    name = f"modeling_{PRUNED_PREFIX}{model.config.model_type.replace('-', '_')}"
    module = import_source(name, source, source_files)
    classes = PrunedClasses(*(getattr(module, f"BlockPruned{type(part).__name__}") for part in (model.config, model)))
    register(classes.config, classes.model)
    return classes


def register_pruned_types() -> None:
    """Register the pruned form of every causal language model in transformers with `AutoConfig`. Their checkpoints then
    load without `trust_remote_code`, and no code from their folders runs."""
    for model_type in list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        pruned_type = PRUNED_PREFIX + model_type
        AutoConfig.register(pruned_type, type("PrunedType", (PrunedType,), {"model_type": pruned_type}), exist_ok=True)


class PrunedType:
    """Placeholder for the config class of a pruned model type. The actual class depends on the config's values (a norm
    may belong to one block or to both), so it is created when a config is read."""

    model_type: str

    @classmethod
    def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
        _check_values(values)
        with torch.device("meta"):
            dense = AutoModelForCausalLM.from_config(source_config(cls.model_type.removeprefix(PRUNED_PREFIX), values))
        classes = pruned_classes(dense, architecture_of(dense), is_narrower=any(values.get(key) for key in WIDTHS))
        return classes.config.from_dict(values, **kwargs)


def register_checkpoint(folder: Path, *, trust_remote_code: bool) -> None:
    """Register the classes of a pruned checkpoint whose source model came with its own code. This imports code from the
    folder, which requires `trust_remote_code`. Has no effect for other folders."""
    values = parse_json(read_bytes(folder / "config.json"))
    pruned_type = str(values.get("model_type", "")) if isinstance(values, dict) else ""
    if not pruned_type.startswith(PRUNED_PREFIX) or pruned_type.removeprefix(PRUNED_PREFIX) in CONFIG_MAPPING:
        return
    _check_values(values)
    if not trust_remote_code:
        raise UserError(f"{str(folder)!r} comes with its own code; give `trust_remote_code` if you trust it.")
    names = {auto: reference.split(".") for auto, reference in values["auto_map"].items()}
    module_name, config_name = names["AutoConfig"]
    main = folder / f"{module_name}.py"
    others = [file for file in sorted(folder.glob("*.py")) if file != main]
    module = import_source(module_name, main.read_text(encoding="utf-8"), others)
    register(getattr(module, config_name), getattr(module, names["AutoModelForCausalLM"][1]))


def _check_values(values: dict[str, Any]) -> None:
    """Raise UserError unless a pruned config has all required keys."""
    if missing := {"auto_map", "block_groups", "source_num_hidden_layers", "source_lists"} - values.keys():
        raise UserError(
            f"expected a checkpoint pruned by this version of BlockPruner, but its config lacks "
            f"{', '.join(sorted(missing))}; prune again."
        )
    if wrong := misfit(values, _PrunedValues) or _disorder(values["block_groups"], values["source_num_hidden_layers"]):
        raise UserError(f"the config of the pruned checkpoint is damaged ({wrong}); restore it, or prune again.")


def _disorder(groups: Sequence[_Group], num_layers: int) -> str:
    """Describe what makes groups of blocks none that a model of `num_layers` layers can have, or return an empty
    string."""
    places: list[float] = []
    for group in groups:
        own = [group["attention"], *([group["attention"] + 0.5] if group["mlp"] else [])]
        places += [*(layer + 0.5 for layer in group["pre"]), *own, *(layer + 0.5 for layer in group["post"])]
        if not {*group.get("empty", ())} <= {*group["pre"], *group["post"]}:
            return "block_groups: a layer is empty, but not there"
    if not groups:
        return "block_groups: no attention is left"
    if places != sorted(set(places)) or places[-1] >= num_layers:
        return f"block_groups: the blocks are not in the order of a model with {num_layers} layers"
    return ""


def source_config(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of the dense model that a pruned model was made from."""
    config_class = CONFIG_MAPPING[model_type]
    own_name = (config_class.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    kept = {key: value for key, value in values.items() if key not in OURS}
    return config_class(**{**kept, **values["source_lists"], own_name: values["source_num_hidden_layers"]})


def _remote_code_files(model: PreTrainedModel) -> list[Path]:
    """Return the code files that came with a model."""
    file = getattr(sys.modules[type(model).__module__], "__file__", None)
    if file is None or "transformers_modules" not in type(model).__module__:
        return []
    return sorted(Path(file).parent.glob("*.py"))


def import_source(name: str, source: str, others: list[Path]) -> ModuleType:
    """Write the modelling file to its own folder in the cache and import it. `save_pretrained` copies it from there."""
    digest = hashlib.sha256(source.encode())
    for file in others:
        digest.update(file.read_bytes())
    package = f"{name}_{digest.hexdigest()[:12]}"
    if f"{PACKAGE}.{package}.{name}" in sys.modules:
        return sys.modules[f"{PACKAGE}.{package}.{name}"]
    root = cache_dir() / "modelling"
    folder = root / package
    folder.mkdir(parents=True, exist_ok=True)
    contents = {file.name: file.read_text(encoding="utf-8") for file in others} | {f"{name}.py": source}
    for file_name, content in contents.items():
        # Replace the file atomically, because another process may be importing it.
        aside = folder / f".{file_name}.{os.getpid()}"
        aside.write_text(content, encoding="utf-8")
        aside.replace(folder / file_name)
    parent = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    parent.__path__ = [str(root)]
    importlib.invalidate_caches()
    return importlib.import_module(f"{PACKAGE}.{package}.{name}")


def name_base(config: PreTrainedConfig, base: type[PreTrainedModel]) -> None:
    """Add the class without a head to the `auto_map` of a config, because vLLM loads that class. transformers writes
    only the names of the classes that it saves."""
    config.auto_map = {"AutoModel": f"{base.__module__.rpartition('.')[2]}.{base.__name__}"}


def register(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> None:
    """Register classes with the Auto classes, and let `save_pretrained` copy their files to the checkpoint."""
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")
    if config.model_type.removeprefix(PRUNED_PREFIX) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # others: PrunedType
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
