"""The config of a copy with only a few of a model's layers, to try something without the model's weights."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig


def with_few_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return a copy of the config with at most `num_layers` layers: of each kind in `layer_types` the first, if there
    is room, and then the first layers. Per-layer lists are cut to them."""
    total = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or []
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    layers = sorted(list(dict.fromkeys([*firsts, *range(total)]))[:num_layers])
    small = copy.deepcopy(config)
    for name, values in per_layer_lists(config.to_dict(), total).items():
        setattr(small, name, [values[layer] for layer in layers])
    small.num_hidden_layers = len(layers)
    return small


def per_layer_lists(values: dict[str, Any], num_layers: int) -> dict[str, list[Any]]:
    """Return the lists in a config that have one entry for each layer."""
    return {
        key: value
        for key, value in values.items()
        if "layer" in key and isinstance(value, list) and len(value) == num_layers
    }
