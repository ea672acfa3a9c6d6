"""One row an architecture: the test suite drives scores, checkpoints and generation of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

NUM_LAYERS = 4
COMMON = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Row:
    config: str
    """The config class's name."""
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-14
    """Largest relative difference of a score to a full forward with the blocks absent."""
    static_cache: bool = True
    """Whether the dense model itself generates correctly with a static cache."""

    def make_config(self) -> PreTrainedConfig:
        config_class: Callable[..., PreTrainedConfig] = getattr(transformers, self.config)
        return config_class(**{**COMMON, **self.options})

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.make_config())
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases, too, must not be trivial
                parameter.add_(torch.randn_like(parameter) * 0.15)
        return model.to(self.dtype).eval()


SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FLOAT32 = {"dtype": torch.float32, "tolerance": 2e-6}

ROWS = {
    "llama": Row("LlamaConfig"),
    "llama tied": Row("LlamaConfig", {"tie_word_embeddings": True}),
    "llama biased": Row("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral sliding": Row("MistralConfig", {"sliding_window": 6}),
    "qwen2": Row("Qwen2Config"),
    "qwen2 sliding": Row("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": Row("Qwen3Config", {"head_dim": 16}),
    "gemma2": Row("Gemma2Config", {"head_dim": 8, "sliding_window": 6}),
    "gemma3": Row("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6, **SLIDING}),
    "phi3": Row("Phi3Config"),
    "olmo2": Row("Olmo2Config"),
    "granite": Row("GraniteConfig", {"residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "starcoder2": Row("Starcoder2Config"),
    "stablelm": Row("StableLmConfig"),
    "stablelm parallel": Row("StableLmConfig", {"use_parallel_residual": True}),
    "cohere": Row("CohereConfig"),
    "gpt2": Row("GPT2Config"),
    "gpt2 scaled by layer": Row("GPT2Config", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox parallel": Row("GPTNeoXConfig"),
    "gpt_neox sequential": Row("GPTNeoXConfig", {"use_parallel_residual": False}),
    "opt": Row("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon parallel": Row("FalconConfig", {"new_decoder_architecture": False, "parallel_attn": True}),
    "falcon two norms": Row("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon sequential": Row(
        "FalconConfig",
        {"new_decoder_architecture": False, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
        static_cache=False,
    ),
    "bloom": Row("BloomConfig", {"n_head": 4, "n_layer": NUM_LAYERS}),
    "mpt": Row("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": NUM_LAYERS, "max_seq_len": 64}),
    "gpt_neo (no row in the engine)": Row(
        "GPTNeoConfig",
        {"num_layers": NUM_LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5},
        static_cache=False,
    ),
    "phi (no row in the engine)": Row("PhiConfig"),
    "gptj (no row in the engine)": Row("GPTJConfig", {"rotary_dim": 4}),
    "mixtral": Row("MixtralConfig", MOE, **FLOAT32),
    "qwen3_moe": Row(
        "Qwen3MoeConfig", {**MOE, "head_dim": 8, "moe_intermediate_size": 24, "mlp_only_layers": [1]}, **FLOAT32
    ),
    "gpt_oss": Row("GptOssConfig", {**MOE, "head_dim": 8, "sliding_window": 6}, **FLOAT32),
    "llama4": Row(
        "Llama4TextConfig",
        {**MOE, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 6},
        **FLOAT32,
    ),
    "granitemoeshared": Row("GraniteMoeSharedConfig", {**MOE, "shared_intermediate_size": 24}, **FLOAT32),
    "gemma4": Row(
        "Gemma4TextConfig",
        {"head_dim": 8, "global_head_dim": 16, "sliding_window": 6, "hidden_size_per_layer_input": 0, **SLIDING},
    ),
}

SHARED = Row(
    "Gemma4TextConfig",
    {
        "head_dim": 8, "global_head_dim": 16, "sliding_window": 6, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 120, "num_kv_shared_layers": 2, **SLIDING,
    },
)  # fmt: skip
"""Layers 2 and 3 read the keys and values of 0 and 1, and all are given values of the tokens."""

LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
DELTA = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
HYBRIDS = {
    "qwen3_next": Row(
        "Qwen3NextConfig",
        {**MOE, **DELTA, **LINEAR, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        **FLOAT32,
    ),
    "qwen3_5": Row("Qwen3_5TextConfig", {**DELTA, **LINEAR}, **FLOAT32),
    "lfm2": Row("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}, **FLOAT32),
    "granitemoehybrid": Row(
        "GraniteMoeHybridConfig", {**MOE, **MAMBA, **LINEAR, "shared_intermediate_size": 24}, **FLOAT32
    ),
    "jamba": Row(
        "JambaConfig",
        {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        **FLOAT32,
    ),
    "falcon_h1": Row("FalconH1Config", {**MAMBA, "mamba_d_ssm": 64}, **FLOAT32),
    "nemotron_h": Row(
        "NemotronHConfig",
        {
            "layer_types": ["linear_attention", "mlp", "full_attention", "full_attention"], "mamba_num_heads": 4,
            "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "head_dim": 8,
        },
        **FLOAT32,
    ),
    "mamba2": Row(
        "Mamba2Config",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        **FLOAT32,
    ),
}  # fmt: skip
"""Decoders whose layers mix tokens by other means than attention, or have only one block."""

SOME = (
    "llama biased", "gemma2", "gpt2", "gpt_neox parallel", "falcon two norms", "bloom", "mixtral", "gpt_oss", "gemma4",
)  # fmt: skip
SOME_ROWS = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in ROWS]
"""One row of each form of layer. Where each row takes long, the others wait for `make slow`."""
