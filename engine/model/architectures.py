"""Where to find the blocks of an architecture. To add a family, add a row. Other families are guessed by common
names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blockpruner.engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The names of a decoder's layers, blocks and norms, and its special features."""

    layers: str = "model.layers"
    """Path of the list of layers, starting from the causal language model."""
    attention: str = "self_attn"
    mlp: str | tuple[str, str] = "mlp"
    """A module, or the first and the last module of an MLP that the layer's own code computes."""
    attention_norms: tuple[str, ...] = ()
    """Norms of the layer that belong to its attention; empty if attention and MLP share one."""
    mlp_norms: tuple[str, ...] = ()
    """Norms of the layer that belong to its MLP; empty if attention and MLP share one."""
    residual_in: frozenset[str] = frozenset()
    """Blocks ("attention", "mlp") that take the residual as their second argument and add it themselves."""
    batched_arguments: tuple[str, ...] = ()
    """Arguments that the layer passes to its attention and that are repeated along dimension 0 for each sequence."""

    @property
    def mlp_modules(self) -> tuple[str, ...]:
        return (self.mlp,) if isinstance(self.mlp, str) else self.mlp


_PRE_NORM = Architecture(attention_norms=("input_layernorm",), mlp_norms=("post_attention_layernorm",))
_SHARED_NORM = Architecture()
_SANDWICH = Architecture(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_POST_NORM_IN_BRANCH = Architecture(
    attention_norms=("post_attention_layernorm",), mlp_norms=("post_feedforward_layernorm",)
)


def _stablelm(config: PreTrainedConfig) -> Architecture:
    return _SHARED_NORM if config.use_parallel_residual else _PRE_NORM


def _falcon(config: PreTrainedConfig) -> Architecture:
    attention_norms: tuple[str, ...] = ()
    mlp_norms: tuple[str, ...] = ()
    if not config.parallel_attn and not config.new_decoder_architecture:
        attention_norms, mlp_norms = ("input_layernorm",), ("post_attention_layernorm",)
    elif config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        attention_norms, mlp_norms = ("ln_attn",), ("ln_mlp",)
    return Architecture(
        layers="transformer.h", attention="self_attention", attention_norms=attention_norms, mlp_norms=mlp_norms
    )


def _opt(config: PreTrainedConfig) -> Architecture:
    if not config.do_layer_norm_before:
        raise UserError(
            "expected a decoder with norms inside its branches, got an OPT model with do_layer_norm_before=False: its "
            "norms act on the residual stream itself, so removing a block is ambiguous."
        )
    return Architecture(
        layers="model.decoder.layers",
        mlp=("fc1", "fc2"),
        attention_norms=("self_attn_layer_norm",),
        mlp_norms=("final_layer_norm",),
    )


def _bloom(config: PreTrainedConfig) -> Architecture:
    if config.apply_residual_connection_post_layernorm:
        raise UserError(
            "expected a decoder whose residual is the stream itself, got a BLOOM model with "
            "apply_residual_connection_post_layernorm=True: its residual is normalised, so a block cannot simply be "
            "removed."
        )
    return Architecture(
        layers="transformer.h",
        attention="self_attention",
        attention_norms=("input_layernorm",),
        mlp_norms=("post_attention_layernorm",),
        residual_in=frozenset({"attention", "mlp"}),
        batched_arguments=("alibi",),
    )


ARCHITECTURES: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "starcoder2", "mixtral", "qwen3_moe", "gemma"),
        _PRE_NORM,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
    "olmo2": _POST_NORM_IN_BRANCH,
    "cohere": _SHARED_NORM,
    "stablelm": _stablelm,
    "gpt2": Architecture(layers="transformer.h", attention="attn", attention_norms=("ln_1",), mlp_norms=("ln_2",)),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        attention="attention",
        attention_norms=("input_layernorm",),
        mlp_norms=("post_attention_layernorm",),
    ),
    "opt": _opt,
    "falcon": _falcon,
    "bloom": _bloom,
    "mpt": Architecture(
        layers="transformer.blocks",
        attention="attn",
        mlp="ffn",
        attention_norms=("norm_1",),
        mlp_norms=("norm_2",),
        residual_in=frozenset({"mlp"}),
    ),
}

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn")
ATTENTION_NORM_NAMES = ("input_layernorm", "ln_1", "norm_1", "attention_norm")
MLP_NORM_NAMES = ("post_attention_layernorm", "ln_2", "norm_2", "ffn_norm")


PRUNED_PREFIX = "blockpruned_"
"""Prefix of the `model_type` of pruned models."""


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return the row for the model's type, or a guess from the names of its modules if there is no row.

    `Decoder.check` verifies a guess by looking at what the layers actually do. Raises UserError if nothing fits.
    """
    if model.config.model_type.startswith(PRUNED_PREFIX):
        raise UserError(
            f"expected a dense model, got one of type {model.config.model_type!r}, which is pruned already; search the "
            f"model that it was made from, and continue from that run."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("expected a model in floating point, got a quantised one; load the unquantised checkpoint.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError("expected a model without adapters, got one with; merge them first.")
    if getattr(model.config, "is_heterogeneous", False):
        raise UserError(
            f"expected a decoder whose layers have the same sizes, got one of type {model.config.model_type!r}, whose "
            f"config differs from layer to layer; it is not supported yet."
        )
    row = ARCHITECTURES.get(model.config.model_type)
    if row is not None:
        return row if isinstance(row, Architecture) else row(model.config)
    return _guess(model)


def _guess(model: PreTrainedModel) -> Architecture:
    num_layers = getattr(model.config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            children = [name for name, _ in module[0].named_children()]
            attention = _only(children, ATTENTION_NAMES)
            mlp = _only(children, MLP_NAMES)
            everywhere = all({attention, mlp} <= dict(layer.named_children()).keys() for layer in module)
            if attention and mlp and everywhere:
                # Keep norms that are not known to belong to one block.
                norms = [name for name in children if "norm" in name or name.startswith("ln")]
                pair = _only(norms, ATTENTION_NORM_NAMES), _only(norms, MLP_NORM_NAMES)
                sequential = len(norms) == 2 and all(pair)
                return Architecture(
                    layers=path,
                    attention=attention,
                    mlp=mlp,
                    attention_norms=(pair[0],) if sequential and pair[0] else (),
                    mlp_norms=(pair[1],) if sequential and pair[1] else (),
                )
    raise UserError(
        f"expected a decoder whose layers have an attention and an MLP module, got a model of type "
        f"{model.config.model_type!r}, in which some layers lack one of them under the usual names."
    )


def _only(names: list[str], known: tuple[str, ...]) -> str | None:
    found = [name for name in names if name in known]
    return found[0] if len(found) == 1 else None


def matmul_weights(module: nn.Module, config: Any) -> int:
    """Number of weights in the module's linear layers. Routed experts count only the weights that one token uses."""
    total = 0
    for parameter in module.parameters():
        if parameter.ndim == 2:
            total += parameter.numel()
        elif parameter.ndim == 3:  # [experts, out, in]
            num_experts = parameter.shape[0]
            total += parameter.numel() * getattr(config, "num_experts_per_tok", num_experts) // num_experts
    return total
