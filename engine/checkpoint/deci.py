"""The DeciLM layout of NVIDIA's Nemotron-NAS models, for Llama-like decoders. vLLM loads it natively, and SGLang,
TensorRT-LLM, mlx-lm and exllamav3 support it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.checkpoint.assembled import assembled
from blockpruner.engine.checkpoint.remainder import Layer, Remainder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.classes.decilm.configuration_decilm import DeciLMConfig
from blockpruner.engine.model.classes.decilm.modeling_decilm import DeciLMForCausalLM, DeciLMModel
from blockpruner.engine.model.classes.pruned import name_base

WIDTHS = 256
"""The engines round the width of an MLP up to a multiple of this. Weights are padded with zeros accordingly."""
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"


def why_not_deci(remainder: Remainder) -> str | None:
    """Return the reason why the layout cannot express a model, or None if it can."""
    if why := _why_never(remainder.config):
        return why
    if remainder.kv_heads:
        config: Any = remainder.config
        return (
            f"it needs the same number of query heads in every attention, {config.num_attention_heads} as in the dense "
            f"model, and some have {_fewer_heads(remainder)}"
        )
    return None


def check_dense(config: PreTrainedConfig, form: str) -> None:
    """Raise UserError if the layout can express no model that is pruned from one with this config.

    form: the name of the format, for the message.
    """
    if why := _why_never(config):
        raise _refusal(form, why)


def _refusal(form: str, why: str) -> UserError:
    return UserError(f"the {form} format cannot express this model: {why}; use `format=grouped`.")


def _why_never(config: Any) -> str | None:
    if config.model_type not in ("llama", "mistral", "qwen2"):
        return f"it is for Llama, Mistral and Qwen2 types, not for {config.model_type!r}"
    if getattr(config, "sliding_window", None) is not None:
        return "it does not support sliding-window attention"
    if config.hidden_act != "silu":
        return f"it supports MLPs with the activation silu, not {config.hidden_act!r}"
    if getattr(config, "mlp_bias", False):
        return "it does not support MLPs with biases"
    return None


def _fewer_heads(remainder: Remainder) -> str:
    """Name the numbers of query heads of the attentions that have fewer than in the dense model."""
    config: Any = remainder.config
    group = config.num_attention_heads // config.num_key_value_heads
    return " or ".join(str(number * group) for number in sorted(set(remainder.kv_heads.values())))


def deci_model(remainder: Remainder) -> tuple[PreTrainedModel, list[str]]:
    """Return the model in this layout, and notes for the user. Raises UserError if the layout cannot express it."""
    if reason := why_not_deci(remainder):
        raise _refusal("deci", reason)
    config, layers, notes = remainder.config, remainder.layers(), []
    weights = dict(remainder.outside)
    for number, layer in enumerate(layers):
        parts = _parts(remainder, layer)
        if number == 0 and layer.attention is None:
            # vLLM needs an attention here: its first layer uses the embedding as the residual only before an attention.
            parts |= _no_attention(remainder)
            layers[0] = Layer(-1, layer.mlp)
            notes.append(
                "the first layer has lost its attention, but vLLM needs one there; one with zero weights is added, "
                "which is exact but costs time and a KV slot"
            )
        weights |= {f"model.layers.{number}.{name}": value for name, value in parts.items()}
    kept = {name: value for name, value in config.to_dict().items() if name in LlamaConfig.__dataclass_fields__}
    for name in ("model_type", "architectures", "transformers_version", "layer_types"):
        kept.pop(name, None)
    written = DeciLMConfig(
        **{
            **kept,
            "num_hidden_layers": len(layers),
            "qkv_bias": config.model_type == "qwen2" or getattr(config, "attention_bias", False),
            "block_configs": [_block_config(layer, remainder) for layer in layers],
        }
    )
    if wider := sorted({width for width in remainder.widths.values() if width % WIDTHS}):
        notes.append(
            f"engines compute MLPs whose width is a multiple of {WIDTHS}, so those with {', '.join(map(str, wider))} "
            f"channels have zeros up to the next one"
        )
    name_base(written, DeciLMModel)
    return assembled(DeciLMForCausalLM, written, weights), notes


def _parts(remainder: Remainder, layer: Layer) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    if layer.attention is not None:
        found = remainder.parts(layer.attention)
        parts |= {name: value for name, value in found.items() if remainder.is_of(name, "attention")}
    if layer.mlp is not None:
        found = remainder.parts(layer.mlp)
        parts |= {name: _padded(name, value) for name, value in found.items() if remainder.is_of(name, "mlp")}
    return parts


def _padded(name: str, value: Tensor) -> Tensor:
    """Pad the weights of an MLP with zeros to the width that the engines compute. Zeros do not change its output."""
    missing = -value.shape[1 if "down_proj" in name else 0] % WIDTHS
    if value.ndim == 1 or missing == 0:  # a norm
        return value
    return torch.nn.functional.pad(value, (0, missing) if "down_proj" in name else (0, 0, 0, missing))


def _no_attention(remainder: Remainder) -> dict[str, Tensor]:
    """Return the weights of an attention that outputs zeros, with the shapes of the other attentions."""
    example = next(block.attention for block in remainder.blocks if block.attention is not None)
    of_attention = _parts(remainder, Layer(example, None))
    return {
        name: torch.ones_like(value) if name.startswith(ATTENTION_NORM) else torch.zeros_like(value)
        for name, value in of_attention.items()
    }


def _block_config(layer: Layer, remainder: Remainder) -> dict[str, dict[str, Any]]:
    """Return the config of one layer, with sizes for kept blocks and null for removed ones, as in NVIDIA's configs."""
    config: Any = remainder.config
    own = config.intermediate_size if layer.mlp is None else remainder.widths.get(layer.mlp, config.intermediate_size)
    width = math.ceil(own / WIDTHS) * WIDTHS
    attention, ffn = layer.attention is not None, layer.mlp is not None
    group = config.num_attention_heads // config.num_key_value_heads
    return {
        "attention": {
            "no_op": not attention,
            "replace_with_linear": False,
            "n_heads_in_group": group if attention else None,
        },
        "ffn": {
            "no_op": not ffn,
            "replace_with_linear": False,
            "ffn_mult": 3 * width / (2 * config.hidden_size) if ffn else None,
        },
    }
