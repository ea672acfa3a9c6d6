"""Find the blocks of a model: its family's row, or a guess by common names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Kind
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.rows import ARCHITECTURES, Architecture

MIXER_NAMES = ("self_attn", "attention", "attn", "self_attention", "linear_attn", "mamba", "conv")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp")
MIXER_NORM_NAMES = ("input_layernorm", "ln_1", "norm_1", "attention_norm", "operator_norm")
MLP_NORM_NAMES = ("post_attention_layernorm", "ln_2", "norm_2", "ffn_norm", "pre_ff_layernorm")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "moe_topk",
    "top_k_experts",
    "moe_top_k",
    "moe_k",
    "num_experts_per_token",
)

PRUNED_PREFIX = "blockpruned_"
"""Prefix of the `model_type` of pruned models."""


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return the row for the model's type, or a guess from the names of its modules if there is no row.

    `check_removable` verifies a guess by looking at what the layers actually do. Raises UserError if nothing fits.
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
    row = ARCHITECTURES.get(model.config.model_type)
    if row is not None:
        return row if isinstance(row, Architecture) else row(model.config)
    return _guess(model)


def _guess(model: PreTrainedModel) -> Architecture:
    num_layers = getattr(model.config, "num_hidden_layers", None)
    for path, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
            children = {name for layer in layers for name, _ in layer.named_children()}
            mixers, mlps = (tuple(name for name in known if name in children) for known in (MIXER_NAMES, MLP_NAMES))
            mixer_norms, mlp_norms = _norms(layers)
            found = Architecture(layers=path, mixers=mixers, mlps=mlps, mixer_norms=mixer_norms, mlp_norms=mlp_norms)
            if _fits(found, layers):
                return found
    raise UserError(
        f"expected a decoder whose layers have an attention or another token mixer and an MLP module, got a model of "
        f"type {model.config.model_type!r}, in which some layers lack one of them under the usual names."
    )


def _fits(found: Architecture, layers: nn.ModuleList) -> bool:
    """Whether every layer has a mixer and an MLP, each of which can be called."""
    for layer in layers:
        mixers, mlps = found.modules_of(layer, Kind.MHA), found.modules_of(layer, Kind.MLP)
        if not mixers or not mlps:
            return False
        if any(isinstance(layer.get_submodule(name), nn.ModuleList) for name in (*mixers, *mlps)):
            return False
    return True


def _norms(layers: nn.ModuleList) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the norms that are known to belong to the mixer alone and to the MLP alone. Others stay when a block is
    removed."""
    per_layer = {tuple(name for name, _ in layer.named_children() if _is_norm(name)) for layer in layers}
    norms = next(iter(per_layer))
    of_mixer, of_mlp = _only(norms, MIXER_NORM_NAMES), _only(norms, MLP_NORM_NAMES)
    if len(per_layer) > 1 or len(norms) != 2 or of_mixer is None or of_mlp is None:
        return (), ()
    return (of_mixer,), (of_mlp,)


def _is_norm(name: str) -> bool:
    return "norm" in name or name.startswith("ln")


def _only(names: Sequence[str], known: tuple[str, ...]) -> str | None:
    found = [name for name in names if name in known]
    return found[0] if len(found) == 1 else None


def experts_per_token(config: Any) -> int:
    """Number of routed experts that a token uses; 0 if no name for it is known. Some configs have one a layer."""
    found = next((value for name in EXPERTS_PER_TOKEN if (value := getattr(config, name, None))), 0)
    return max(found) if isinstance(found, list) else found


def routes_tokens(model: PreTrainedModel) -> bool:
    """Whether a model routes tokens to experts, as far as names tell."""
    return bool(experts_per_token(model.config)) or any("experts" in name for name, _ in model.named_modules())


def matmul_weights(module: nn.Module, config: Any) -> int:
    """Number of weights in the module's linear layers and convolutions. Routed experts count only the weights that one
    token uses."""
    total = 0
    for owner in module.modules():
        for weight in owner.parameters(recurse=False):
            if weight.ndim == 2 or isinstance(owner, nn.Conv1d):
                total += weight.numel()
            elif weight.ndim == 3:  # [experts, out, in]
                num_experts = weight.shape[0]
                total += weight.numel() * min(experts_per_token(config) or num_experts, num_experts) // num_experts
    return total
