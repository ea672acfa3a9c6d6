"""The DeciLM layout of NVIDIA's Nemotron-NAS models, for Llama-like decoders: vLLM loads it natively, and SGLang,
TensorRT-LLM, mlx-lm and exllamav3 know it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from blockpruner.engine.checkpoint.assembled import assembled
from blockpruner.engine.checkpoint.decilm.configuration_decilm import DeciLMConfig
from blockpruner.engine.checkpoint.decilm.modeling_decilm import DeciLMForCausalLM, DeciLMModel
from blockpruner.engine.checkpoint.remainder import Layer, Remainder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.pruned_classes import name_base

WIDTHS = 256
"""The engines round the width of an MLP up to a multiple of this; zeros are added up to there."""
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"


def why_not_deci(remainder: Remainder) -> str | None:
    """Why the layout cannot express a model, or None if it can."""
    config, model_type = remainder.config, remainder.config.model_type
    if model_type not in ("llama", "mistral", "qwen2"):
        return f"it is for Llama, Mistral and Qwen2 types, not for {model_type!r}"
    if getattr(config, "sliding_window", None) is not None:
        return "it has no sliding-window attention"
    if config.hidden_act != "silu":
        return f"its MLPs have the activation silu, not {config.hidden_act!r}"
    if getattr(config, "mlp_bias", False):
        return "its MLPs have no biases"
    return None


def deci_model(remainder: Remainder) -> tuple[PreTrainedModel, list[str]]:
    """The model in this layout, and what has to be said about it. Raises UserError if the layout cannot express it."""
    if reason := why_not_deci(remainder):
        raise UserError(f"the deci format cannot express this model: {reason}; use --format grouped.")
    config, layers, notes = remainder.config, remainder.layers(), []
    weights = dict(remainder.outside)
    for number, layer in enumerate(layers):
        parts = _parts(remainder, layer)
        if number == 0 and layer.attention is None:
            # vLLM fails without it: its first layer takes the embedding as the residual only in front of an attention.
            parts |= _no_attention(remainder)
            layers[0] = Layer(-1, layer.mlp)
            notes.append(
                "the first layer lost its attention; vLLM needs one there, so it has one whose weights are zero: "
                "exact, but it takes time and a KV slot"
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
            "block_configs": [_block_config(layer, config) for layer in layers],
        }
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
    """An MLP's weights with zeros up to the width that the engines compute: they add nothing."""
    missing = -value.shape[1 if "down_proj" in name else 0] % WIDTHS
    if value.ndim == 1 or missing == 0:  # a norm
        return value
    return torch.nn.functional.pad(value, (0, missing) if "down_proj" in name else (0, 0, 0, missing))


def _no_attention(remainder: Remainder) -> dict[str, Tensor]:
    """An attention that gives zeros, of the same shapes as the others."""
    example = next(block.attention for block in remainder.blocks if block.attention is not None)
    of_attention = _parts(remainder, Layer(example, None))
    return {
        name: torch.ones_like(value) if name.startswith(ATTENTION_NORM) else torch.zeros_like(value)
        for name, value in of_attention.items()
    }


def _block_config(layer: Layer, config: Any) -> dict[str, dict[str, Any]]:
    """Kept blocks state their sizes, removed ones null, as in NVIDIA's own configs."""
    width = math.ceil(config.intermediate_size / WIDTHS) * WIDTHS
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
