"""The config of a copy with only a few of a model's layers, to try something without the model's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig


def with_few_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return a copy of the config with at most `num_layers` layers: of each kind the first, if there is room, and then
    the first layers. `layer_types` and `LAST_LAYERS` tell kinds apart. Per-layer lists are cut to them."""
    total = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [""] * total
    ends = [total - (getattr(config, name, None) or 0) for name in LAST_LAYERS]
    kinds = [(kind, *(layer >= end for end in ends)) for layer, kind in enumerate(types)]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    layers = sorted(list(dict.fromkeys([*firsts, *range(total)]))[:num_layers])
    return with_layers(config, layers)


def with_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Return a copy of the config for the given layers, in the given order."""
    found = copy.deepcopy(config)
    lists = per_layer_values(config.to_dict(), config.num_hidden_layers)
    if getattr(found, "is_heterogeneous", False):
        found.per_layer_config = None  # before the number of layers, which it must fit
    found.num_hidden_layers = len(layers)
    for name, values in lists.items():
        setattr(found, name, cut(values, layers, config.num_hidden_layers))
    return found


def set_vocab_size(config: PreTrainedConfig, vocab_size: int) -> None:
    """Set the number of rows of all embeddings of tokens."""
    for name in [name for name in vars(config) if name == "vocab_size" or name.startswith("vocab_size_")]:
        setattr(config, name, vocab_size)


LAST_LAYERS = ("num_kv_shared_layers",)
"""What configs call numbers of layers at the end that differ from the others."""
PerLayer = list[Any] | dict[Any, Any] | int


def per_layer_values(values: dict[str, Any], num_layers: int) -> dict[str, PerLayer]:
    """Return what a config says by layer: its lists with one entry for each layer, numbers of its last layers, and last
    the values in which single layers differ, by the number of the layer."""
    found: dict[str, PerLayer] = dict(per_layer_lists(values, num_layers))
    found |= {name: values[name] for name in LAST_LAYERS if values.get(name)}
    if values.get("per_layer_config") is not None:
        found["per_layer_config"] = values["per_layer_config"]
    return found


def cut(values: PerLayer, layers: Sequence[int], num_layers: int) -> PerLayer:
    """Return the values of some of `num_layers` layers, which get new numbers."""
    if isinstance(values, int):
        return sum(layer >= num_layers - values for layer in layers)
    if isinstance(values, list):
        return [values[layer] for layer in layers]
    by_layer = {int(layer): value for layer, value in values.items()}
    return {number: by_layer[layer] for number, layer in enumerate(layers) if layer in by_layer}


def per_layer_lists(values: dict[str, Any], num_layers: int) -> dict[str, list[Any]]:
    """Return the lists in a config that have one entry for each layer."""
    return {
        key: value
        for key, value in values.items()
        if "layer" in key and isinstance(value, list) and len(value) == num_layers
    }
