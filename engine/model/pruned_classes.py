"""The classes of a pruned model: a short modelling file that subclasses the architecture's own classes.

The file is written from one template, imported here, and lies beside the weights of every checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.resources
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import PRUNED_PREFIX, Architecture, architecture_of
from blockpruner.engine.model.cache import cache_dir

PACKAGE = "blockpruned_modules"
"""Importable package that holds the modelling files in use."""


@dataclass(frozen=True)
class PrunedClasses:
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]


def pruned_classes(model: PreTrainedModel, architecture: Architecture) -> PrunedClasses:
    """The classes of `model`'s pruned form, imported and known to the Auto classes, so that their checkpoints load
    without `trust_remote_code` in this process and `save_pretrained` copies the modelling file."""
    source_files = _remote_code_files(model)
    source = modelling_source(model, architecture, is_remote=bool(source_files))
    name = f"modeling_{PRUNED_PREFIX}{model.config.model_type.replace('-', '_')}"
    module = import_source(name, source, source_files)
    classes = PrunedClasses(*(getattr(module, f"BlockPruned{type(part).__name__}") for part in (model.config, model)))
    register(classes.config, classes.model)
    return classes


def register_pruned_types() -> None:
    """Make the pruned form of every causal language model in transformers known to `AutoConfig`: then its checkpoints
    load without `trust_remote_code`, and no code from their folders runs."""
    for model_type in list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        pruned_type = PRUNED_PREFIX + model_type
        AutoConfig.register(pruned_type, type("PrunedType", (PrunedType,), {"model_type": pruned_type}), exist_ok=True)


class PrunedType:
    """Stands for the config class of a pruned model type. Which class that is hangs on the config's values (a norm may
    belong to one block or to both), so it is made when a config is read."""

    model_type: str

    @classmethod
    def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
        _check_values(values)
        with torch.device("meta"):
            dense = AutoModelForCausalLM.from_config(source_config(cls.model_type.removeprefix(PRUNED_PREFIX), values))
        return pruned_classes(dense, architecture_of(dense)).config.from_dict(values, **kwargs)


def register_checkpoint(folder: Path, *, trust_remote_code: bool) -> None:
    """Make the classes of a pruned checkpoint known to the Auto classes if its source model brought code: then the
    folder's own code is imported, and that must be trusted. Nothing happens for other folders."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pruned_type = str(values.get("model_type", "")) if isinstance(values, dict) else ""
    if not pruned_type.startswith(PRUNED_PREFIX) or pruned_type.removeprefix(PRUNED_PREFIX) in CONFIG_MAPPING:
        return
    _check_values(values)
    if not trust_remote_code:
        raise UserError(f"{str(folder)!r} brings its own code; give --trust-remote-code if you trust it.")
    names = {auto: reference.split(".") for auto, reference in values["auto_map"].items()}
    module_name, config_name = names["AutoConfig"]
    main = folder / f"{module_name}.py"
    others = [file for file in sorted(folder.glob("*.py")) if file != main]
    module = import_source(module_name, main.read_text(encoding="utf-8"), others)
    register(getattr(module, config_name), getattr(module, names["AutoModelForCausalLM"][1]))


def _check_values(values: dict[str, Any]) -> None:
    """Raise UserError unless a pruned config has all that is read of it."""
    if missing := {"auto_map", "block_groups", "source_num_hidden_layers", "source_lists"} - values.keys():
        raise UserError(
            f"expected a checkpoint pruned by this version of BlockPruner, but its config lacks "
            f"{', '.join(sorted(missing))}; prune again."
        )


def source_config(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    """The config of the dense model that a pruned one was made from."""
    config_class = CONFIG_MAPPING[model_type]
    own_name = (config_class.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    ours = {"model_type", "architectures", "auto_map", "block_groups", "source_num_hidden_layers", "source_lists"}
    kept = {key: value for key, value in values.items() if key not in ours}
    return config_class(**{**kept, **values["source_lists"], own_name: values["source_num_hidden_layers"]})


def modelling_source(model: PreTrainedModel, architecture: Architecture, *, is_remote: bool = False) -> str:
    """The text of the modelling file for models like this one."""
    layer_class = type(model.get_submodule(architecture.layers)[0])
    classes = [type(model.config), type(model), type(model.base_model), layer_class]
    base = model.base_model_prefix
    layers = architecture.layers.removeprefix(f"{base}.")
    template = importlib.resources.files("blockpruner.engine.model").joinpath("modeling_grouped.template")
    text = Template(template.read_text(encoding="utf-8")).substitute(
        model_type=model.config.model_type,
        imports="\n".join(_imports(classes, is_remote)),
        config_class=type(model.config).__name__,
        causal_class=type(model).__name__,
        base_class=type(model.base_model).__name__,
        layer_class=layer_class.__name__,
        base=base,
        layers=layers,
        attention=architecture.attention,
        absent_modules=_absent_modules(architecture),
        remove_mlp=_remove_mlp(architecture),
        remove_attention_norms=_identities(architecture.attention_norms, "self", indent=8),
    )
    return text


def _imports(classes: Iterable[type], is_remote: bool) -> list[str]:
    by_module: dict[str, set[str]] = {}
    for cls in classes:
        by_module.setdefault(cls.__module__, set()).add(cls.__name__)
    lines = []
    for module, names in sorted(by_module.items()):
        # Remote code lies beside the new file.
        where = f".{module.rpartition('.')[2]}" if is_remote and "transformers_modules" in module else module
        lines.append(f"from {where} import {', '.join(sorted(names))}")
    return lines


def _absent_modules(architecture: Architecture) -> str:
    """The classes that stand where a block was: they give what leaves the stream as it is."""
    zeros, residual = "torch.zeros_like(hidden_states)", "residual"
    attention = residual if "attention" in architecture.residual_in else zeros
    mlp = residual if "mlp" in architecture.residual_in else zeros
    attention_arguments = "hidden_states, residual, *args" if attention == residual else "hidden_states, *args"
    mlp_arguments = "hidden_states, residual" if mlp == residual else "hidden_states"
    return (
        "class NoAttention(nn.Module):\n"
        f"    def forward(self, {attention_arguments}, **kwargs):\n"
        f"        return {attention}, None\n"
        "\n\n"
        "class NoMlp(nn.Module):\n"
        f"    def forward(self, {mlp_arguments}):\n"
        f"        return {mlp}"
    )


def _remove_mlp(architecture: Architecture) -> str:
    *before, last = architecture.mlp_modules
    lines = [f"    layer.{name} = nn.Identity()" for name in before] + [f"    layer.{last} = NoMlp()"]
    return "\n".join(lines) + "\n" + _identities(architecture.mlp_norms, "layer", indent=4).rstrip("\n")


def _identities(norms: tuple[str, ...], owner: str, indent: int) -> str:
    return "".join(f"{' ' * indent}{owner}.{norm} = nn.Identity()\n" for norm in norms)


def _remote_code_files(model: PreTrainedModel) -> list[Path]:
    """The files of a model that brought its own code."""
    file = getattr(sys.modules[type(model).__module__], "__file__", None)
    if file is None or "transformers_modules" not in type(model).__module__:
        return []
    return sorted(Path(file).parent.glob("*.py"))


def import_source(name: str, source: str, others: list[Path]) -> ModuleType:
    """Import the modelling file from a folder of its own in the cache: `save_pretrained` copies the file from there."""
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
        # Another process may import the file at this moment: it must never be half there.
        aside = folder / f".{file_name}.{os.getpid()}"
        aside.write_text(content, encoding="utf-8")
        aside.replace(folder / file_name)
    parent = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    parent.__path__ = [str(root)]
    importlib.invalidate_caches()
    return importlib.import_module(f"{PACKAGE}.{package}.{name}")


def name_base(config: PreTrainedConfig, base: type[PreTrainedModel]) -> None:
    """Have the config of a saved model name the class without a head, too: vLLM loads that one. transformers writes
    only the names of the classes that it saves."""
    config.auto_map = {"AutoModel": f"{base.__module__.rpartition('.')[2]}.{base.__name__}"}


def register(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> None:
    """Make classes known to the Auto classes, and let `save_pretrained` copy their files beside the weights."""
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")
    if config.model_type.removeprefix(PRUNED_PREFIX) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # else: PrunedType
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
