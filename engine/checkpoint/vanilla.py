"""The stock architecture: remaining blocks are paired into full layers, and missing blocks become zeros. It loads
everywhere without custom code, but blocks of zeros are still computed."""

from __future__ import annotations

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.checkpoint.assembled import assembled
from blockpruner.engine.checkpoint.deci import why_not_deci
from blockpruner.engine.checkpoint.remainder import Layer, Remainder
from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.few_layers import cut, per_layer_values
from blockpruner.engine.model.rows import Architecture


def vanilla_model(remainder: Remainder, *, sequential: bool) -> tuple[PreTrainedModel, list[str]]:
    """Return the model in its stock architecture, and a note on how much of the saving is kept.

    `sequential`: allow an attention and an MLP of different layers to become one layer. This is wrong for decoders
    whose attention and MLP run in parallel, so the result must be compared with the pruned model.

    Raises UserError if the architecture cannot express the remaining blocks.
    """
    check_pairs(remainder.config, remainder.architecture)
    layers = remainder.layers(sequential=sequential)
    width = _width(remainder)
    try:
        config = _config(remainder, layers, width)
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config)
        weights, num_zeros = _weights(remainder, layers, shapes)
        model = assembled(type(shapes), config, weights)
    except (RuntimeError, ValueError, TypeError, IndexError, StrictDataclassError) as error:
        raise _refusal(remainder, first_line(error)) from error
    return model, [_saving(remainder, layers, num_zeros, width), *_pattern(remainder, config)]


def check_pairs(config: PreTrainedConfig, architecture: Architecture) -> None:
    """Raise UserError for a dense model whose layers are not pairs of an attention and an MLP."""
    if architecture.only_mlp or not architecture.mlps:
        raise UserError(
            f"the vanilla format cannot express this model of type {config.model_type!r}: its layers have one block "
            f"each; use `format=grouped`."
        )


def _refusal(remainder: Remainder, why: str) -> UserError:
    """Return the error that says why this format cannot express the model, and which formats can."""
    others = "`format=grouped`" if why_not_deci(remainder) else "`format=grouped` or deci"
    return UserError(
        f"the vanilla format cannot express this model of type {remainder.config.model_type!r}: {why}; use {others}."
    )


def _width(remainder: Remainder) -> int | None:
    """Return the number of channels of all MLPs if it is not that of the dense model. Raises UserError if they differ
    from each other, which a stock config cannot say."""
    if remainder.kv_heads:
        raise _refusal(remainder, "it needs the dense model's number of heads in every attention, and some have fewer")
    if not remainder.widths:
        return None
    kept = [block.mlp for block in remainder.blocks if block.mlp is not None]
    widths = {remainder.widths.get(layer) for layer in kept}
    if len(widths) > 1:
        raise _refusal(remainder, "its MLPs have different numbers of channels")
    if not hasattr(remainder.config, "intermediate_size"):
        raise _refusal(remainder, "its config has no intermediate_size to say how many channels its MLPs have")
    return widths.pop()


def _config(remainder: Remainder, layers: list[Layer], width: int | None) -> PreTrainedConfig:
    """Return the dense config with fewer layers. Per-layer lists are cut; a layer has the type of its attention. width:
    number of channels of its MLPs, if they are narrower."""
    dense = remainder.config
    values = dense.to_dict()
    num_layers = dense.num_hidden_layers
    for name, value in per_layer_values(values, num_layers).items():
        values[name] = cut(value, [layer.source for layer in layers], num_layers)
    own_name = (dense.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    if width is not None:
        values[(dense.attribute_map or {}).get("intermediate_size", "intermediate_size")] = width
    for name in ("architectures", "transformers_version"):
        values.pop(name, None)
    return type(dense)(**{**values, own_name: len(layers)})


def _weights(remainder: Remainder, layers: list[Layer], model: PreTrainedModel) -> tuple[dict[str, Tensor], int]:
    """Return all tensors of `model`, and how many of their values are zeros for missing blocks."""
    weights, num_zeros = dict(remainder.outside), 0
    shapes = model.state_dict()
    dtype = next(iter(weights.values())).dtype
    for number, layer in enumerate(layers):
        parts: dict[str, Tensor] = {}
        for source in {layer.attention, layer.mlp} - {None}:
            assert source is not None
            for name, value in remainder.parts(source).items():
                is_attention, is_mlp = remainder.is_of(name, "attention"), remainder.is_of(name, "mlp")
                # A tensor that belongs to both blocks (a shared norm) is taken from any block that is present.
                if (source == layer.attention or not is_attention) and (source == layer.mlp or not is_mlp):
                    parts[name] = value
        prefix = f"{remainder.architecture.layers}.{number}."
        for name in (name.removeprefix(prefix) for name in shapes if name.startswith(prefix)):
            missing = (layer.attention is None and remainder.is_of(name, "attention")) or (
                layer.mlp is None and remainder.is_of(name, "mlp")
            )
            if missing and name not in parts:
                parts[name] = torch.zeros(shapes[prefix + name].shape, dtype=dtype)
                num_zeros += parts[name].numel()
        weights |= {prefix + name: value for name, value in parts.items()}
    return weights, num_zeros


def _pattern(remainder: Remainder, config: PreTrainedConfig) -> list[str]:
    """Return a note if a program that knows the kinds of layers from the family alone would get them wrong."""
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds == remainder.config.layer_types[: len(kinds)]:
        return []
    return [
        "the kinds of its layers (`layer_types` in config.json) no longer follow the pattern of the dense model; "
        "programs that assume the pattern instead of reading them, such as llama.cpp, compute something else"
    ]


def _saving(remainder: Remainder, layers: list[Layer], num_zeros: int, width: int | None) -> str:
    """Say how much of the saving is kept. width: number of channels of its MLPs, if they are narrower."""
    num_layers = remainder.config.num_hidden_layers
    removed = 2 * num_layers - len(remainder.blocks)
    narrower = "" if width is None else f"; all of its MLPs have {width} channels, which keeps all that they save"
    if removed == 0:
        return f"{len(layers)} full layers of {num_layers}: no whole block is removed{narrower}"
    holes = sum(layer.attention is None or layer.mlp is None for layer in layers)
    share = (removed - holes) / removed
    return (
        f"{len(layers)} full layers of {num_layers}: of the {removed} removed blocks {removed - holes} are gone "
        f"({share:.0%} of the saving in blocks), {holes} remain as zeros ({num_zeros:,} parameters), which still cost "
        f"memory, KV slots and time{narrower}"
    )
