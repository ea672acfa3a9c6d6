"""The shape of a decoder, read from its modules and its config. No weights are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.model.architectures import matmul_weights, routes_tokens
from blockpruner.engine.model.narrowing import Narrow
from blockpruner.engine.model.rows import Architecture
from blockpruner.engine.work.shape import AND, ATTENTION, CONVOLUTION, BlockShape, ModelShape

LINEAR = "linear attention"
LINEAR_TYPES = ("linear_attention", "recurrent")
"""Names in `layer_types` of mixers with a state of constant size."""


def shape_of(
    model: PreTrainedModel, architecture: Architecture, layers: Sequence[nn.Module], narrow: Mapping[Block, Narrow]
) -> ModelShape:
    """narrow: the blocks whose groups can be removed one by one."""
    config = model.config

    def block_shape(number: int, kind: Kind) -> BlockShape:
        layer, channels = layers[number], narrow.get(Block(kind, number))
        modules = nn.ModuleList(layer.get_submodule(name) for name in architecture.modules_of(layer, kind))
        norms = architecture.norms_of(layer, kind)
        dead = [weight for name in norms for weight in layer.get_submodule(name).parameters()]
        return BlockShape(
            num_parameters=sum(weight.numel() for weight in [*modules.parameters(), *dead]),
            num_matmul_weights=matmul_weights(modules, config),
            **({} if channels is None else _channels(channels)),
        )

    mha, mlp = (tuple(block_shape(number, kind) for number in range(len(layers))) for kind in (Kind.MHA, Kind.MLP))
    totals = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    of_layer = layer_configs(config)
    heads = [_heads(one) for one in of_layer]
    leaving = [number for number, layer in enumerate(layers) if architecture.leaves_something(layer)]
    return ModelShape(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_width=max(number * width for number, width in heads),
        num_score_heads=max(number for number, _ in heads) if config._attn_implementation == "eager" else 0,
        routes_tokens=routes_tokens(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        mha=mha,
        mlp=mlp,
        mixers=_mixers(model, architecture, layers),
        needed=frozenset(Block(Kind.MHA, number) for number in leaving),
        left_width=sum(_width_of_cache(of_layer[number % len(of_layer)]) for number in leaving),
        token_width=_token_width(model, architecture),
        shared=tuple(
            0 if architecture.has_rest else total - mixer.num_parameters - feed_forward.num_parameters
            for total, mixer, feed_forward in zip(totals, mha, mlp, strict=True)
        ),
    )


def _channels(block: Narrow) -> dict[str, int]:
    parameters, weights = block.channel_parameters
    return {
        "num_channels": block.num_channels,
        "channel_parameters": parameters,
        "channel_matmul_weights": weights,
        "num_groups": block.num_groups,
    }


def _mixers(model: PreTrainedModel, architecture: Architecture, layers: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return what mixes the tokens of each layer; empty if all have attention."""
    types = getattr(model.config, "layer_types", None) or []
    types = types if len(types) == len(layers) else [""] * len(layers)
    names = [architecture.modules_of(layer, Kind.MHA) for layer in layers]
    found = tuple(
        AND.join(_kind_of(layer.get_submodule(name), name, layer_type) for name in of_layer)
        for layer, of_layer, layer_type in zip(layers, names, types, strict=True)
    )
    return () if set(found) == {ATTENTION} and all(architecture.modules_of(x, Kind.MLP) for x in layers) else found


def _kind_of(mixer: nn.Module, name: str, layer_type: str) -> str:
    """Return the kind of a mixer, by its name and its class, or else by what the config calls its layer."""
    if "mamba" in name or "Mamba" in type(mixer).__name__:
        return "mamba"
    if "conv" in name:
        return CONVOLUTION
    return LINEAR if name == "linear_attn" or layer_type in LINEAR_TYPES else ATTENTION


def layer_configs(config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
    """Return the config of each layer; only one if they are all the same."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def _width_of_cache(config: PreTrainedConfig) -> int:
    """Return the number of values in a token's keys and values of one layer."""
    number, width = _heads(config)
    return 2 * (getattr(config, "num_key_value_heads", None) or number) * width


def _token_width(model: PreTrainedModel, architecture: Architecture) -> int:
    """Return the number of values per token that all layers together are given."""
    names = architecture.by_layer_of(model)
    base = model.get_submodule(architecture.layers.rpartition(".")[0])
    return len(base.get_submodule(names[-1]).weight) if names else 0


def _heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the number of query heads and their size; none for a model without attention."""
    number = getattr(config, "num_attention_heads", None) or 0
    return number, number and (getattr(config, "head_dim", None) or config.hidden_size // number)
