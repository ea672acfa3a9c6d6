"""The classes of a multimodal model whose text decoder lacks blocks, in a modelling file of their own.

The file has the pruned form of the text decoder's own classes, as that of a language model has (pruned.py), and a
subclass of the whole model that holds such a decoder.
"""

from __future__ import annotations

import importlib.resources
import inspect
from dataclasses import dataclass
from string import Template
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blockpruner.engine.model.classes.modelling_text import modelling_source
from blockpruner.engine.model.classes.pruned import import_source
from blockpruner.engine.model.rows import Architecture

WHOLE_PREFIX = "whole_blockpruned_"
"""Prefix of the `model_type` of multimodal models with a pruned text decoder."""


@dataclass(frozen=True)
class WholeClasses:
    config: type[PreTrainedConfig]
    text_config: type[PreTrainedConfig]
    model: type[PreTrainedModel]


def whole_classes(whole: PreTrainedModel, path: str, text_key: str, architecture: Architecture) -> WholeClasses:
    """Import the classes of a multimodal model's pruned form, and let `save_pretrained` copy their file.

    path: of the text decoder in the whole model. text_key: of its config in the whole config. architecture: of the text
    decoder as a causal language model.
    """
    decoder = whole.get_submodule(path)
    names = {
        "model_type": WHOLE_PREFIX + whole.config.model_type,
        "whole_type": whole.config.model_type,
        "whole_class": type(whole).__name__,
        "config_class": type(whole.config).__name__,
        "text_config_class": type(decoder.config).__name__,
        "decoder_class": type(decoder).__name__,
        "text_key": text_key,
        "decoder": path,
        "imports": "\n".join(
            f"from {part.__module__} import {part.__name__}" for part in (type(whole.config), type(whole))
        ),
    }
    is_deep = "deepstack_visual_embeds" in inspect.signature(type(decoder).forward).parameters
    deep = "import functools\n\n\n" + _template("modeling_deepstack").substitute(names) if is_deep else ""
    made = "DeepStacked" if is_deep else f"BlockPruned{type(decoder).__name__}"
    source = _decoder_source(decoder, architecture) + _template("modeling_whole").substitute(
        names, deepstack=deep, made_class=made
    )
    module = import_source(f"modeling_{WHOLE_PREFIX}{whole.config.model_type.replace('-', '_')}", source, [])
    found = [getattr(module, f"BlockPruned{type(part).__name__}") for part in (whole.config, decoder.config, whole)]
    config, text_config, model = found
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForImageTextToText")
    return WholeClasses(config, text_config, model)


def _template(name: str) -> Template:
    file = importlib.resources.files("blockpruner.engine.model.classes").joinpath(f"{name}.template")
    return Template(file.read_text(encoding="utf-8"))


def _decoder_source(decoder: nn.Module, architecture: Architecture) -> str:
    """Return the part of a pruned language model's file that is about its layers and the decoder without a head."""
    stand_in = _under_a_head(decoder, architecture.layers.partition(".")[0])
    source = modelling_source(stand_in, architecture)
    return source.partition(f"\n\nclass BlockPruned{type(stand_in).__name__}(")[0].rstrip() + "\n"


def _under_a_head(decoder: nn.Module, prefix: str) -> Any:
    """Return a module with the given decoder where a causal language model has it. Its class is named as one that the
    file can import."""
    parent = next(kind for kind in type(decoder).__mro__[1:] if issubclass(kind, PreTrainedModel))
    holder: Any = type(parent.__name__, (nn.Module,), {"__module__": parent.__module__})()
    holder.add_module(prefix, decoder)
    holder.base_model_prefix = prefix
    holder.base_model = decoder
    holder.config = decoder.config
    return holder
