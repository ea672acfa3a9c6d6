"""The classes of pruned models, by the `model_type` of the dense model, and their registration with transformers."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.checkpoint.modeling_blockpruned_llama import BlockPrunedLlamaConfig, BlockPrunedLlamaForCausalLM

PRUNED_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (BlockPrunedLlamaConfig, BlockPrunedLlamaForCausalLM),
}


def register() -> None:
    """Let the Auto classes load pruned checkpoints without `trust_remote_code`, and let `save_pretrained` copy the
    modelling file beside the weights. Harmless when repeated."""
    for config_class, model_class in PRUNED_CLASSES.values():
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
