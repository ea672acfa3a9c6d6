"""Tiny configurations of the decoder types of transformers: what the defaults of their own classes do not make tiny.

By type, or by type and what is special ("jamba (all dense)").
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 512
LAYERS = 4

SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "audio_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_size",
            "input_embedding_size",
            "output_embedding_size",
            "word_embed_proj_dim",
            "backbone_hidden_size",
            "attention_hidden_size",
            "projection_dim",
            "projection_hidden_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_encoder_layers",
            "num_decoder_layers",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "attention_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "swa_num_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head"), 8),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_inner",
            "dff",
            "dim_ff",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "feed_forward_size",
        ),
        48,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        24,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "context_length",
            "model_max_length",
            "original_max_position_embeddings",
            "max_target_positions",
        ),
        128,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size"), 6
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # state space and linear attention
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "eod_token_id": 3,
    "is_decoder": True,
    "query_pre_attn_scalar": 8,
    "router_jitter_noise": 0.0,
}
FULL_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# By family: changes to the config. "+model_type": the model_type whose config class is used, if it is not the name.
# A value of DROP leaves a field out of SMALL, so that the class's own default stands. A function is called when needed.
DROP = object()
MLA = {"num_key_value_heads": 4}
LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
CONV = ["conv", "full_attention", "conv", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


OPTIONS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "intermediate_size": None},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [1]},
    **{
        name: {"layer_types": FULL_SLIDING}
        for name in (
            "gemma2",
            "gemma3_text",
            "vaultgemma",
            "cohere2",
            "exaone4",
            "olmo3",
            "gpt_oss",
            "afmoe",
            "exaone_moe",
            "cwm",
            "granite_swa",
            "granitemoe_swa",
            "ministral",
            "gemma4_unified_text",
            "mimo_v2_flash",
            "kolibri1",
            "laguna",
            "mellum",
            "beam",
            "flint",
            "cohere2_moe",
            "modernbert-decoder",
        )
    },
    **{
        name: dict(MLA)
        for name in (
            "axk1",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
            "mistral4",
        )
    },
    "axk2": {**MLA, "head_dim": 16},
    "deepseek_v2": {**MLA, "n_group": 1, "topk_group": 1},
    "deepseek_v32": {**MLA, "head_dim": 16},
    "glm_moe_dsa": {**MLA, "head_dim": 16},
    "kimi_linear": {**MLA, "layer_types": LINEAR},
    "bailing_hybrid": {**MLA, "layer_types": LINEAR, "head_dim": 16},
    "hy_v4": {**MLA, "head_dim": 16},
    "dots1": {"layer_types": FULL_SLIDING},
    "dots3_note_text": {
        "head_dim": 16,
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "mlp_layer_types": DROP,
    },
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "sliding_window": None},
    "falcon": {"new_decoder_architecture": True},
    "mpt": {"max_seq_len": 64},
    "cohere_compass_text": {
        "layer_types": FULL_SLIDING,
        "rope_parameters": {
            "full_attention": {**ROPE, "mrope_section": [2, 1, 1]},
            "sliding_attention": {**ROPE, "mrope_section": [2, 1, 1]},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "llama4_text": {"attention_chunk_size": 6, "interleave_moe_layer_step": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": LINEAR},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": CONV},
    "lfm2_moe": {"layer_types": CONV},
    "lfm3": {"layer_types": CONV},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "xlstm": {"num_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": FULL_SLIDING, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": FULL_SLIDING},  # as E2B and E4B
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "layer_types": LINEAR,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 512,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 32,
        "shape_embed_dim": 32,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen3_next": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "olmo_hybrid": {"layer_types": LINEAR},
    # Further settings of families above, for what they share, skip or scale.
    "gemma4_text (31B: no per-layer input)": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "layer_types": FULL_SLIDING,
    },
    "gemma4_text (layer_scalar not 1)": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "layer_types": FULL_SLIDING,
        "+buffers": ["layer_scalar"],
    },
    "gemma4_text (26B-A4B: MoE)": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "layer_types": FULL_SLIDING,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "gemma4_unified_text (layer_scalar not 1)": {"layer_types": FULL_SLIDING, "+buffers": ["layer_scalar"]},
    "glm_moe_dsa (shared indexers)": {**MLA, "head_dim": 16, "indexer_types": ["full", "shared", "full", "shared"]},
    "granitemoehybrid (4.0 micro: attention, dense)": {"layer_types": ["full_attention"] * 4, "num_local_experts": 0},
    "granitemoehybrid (4.0 h-micro: mamba, dense)": {"layer_types": LINEAR, "num_local_experts": 0},
    "granitemoehybrid (attention, MoE)": {"layer_types": ["full_attention"] * 4},
    "llama4_text (all MoE: Scout)": {"attention_chunk_size": 6, "interleave_moe_layer_step": 1},
    "llama4_text (all dense)": {"attention_chunk_size": 6, "moe_layers": []},
    "llama (dynamic RoPE)": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "llama (yarn)": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
    "phi3 (longrope)": {
        "sliding_window": None,
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 8,
        },
    },
    "phi (qk_layernorm)": {"qk_layernorm": True},
    "cohere (qk norm)": {"use_qk_norm": True},
    "stablelm (parallel, qk norm)": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    "falcon (7b)": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "falcon (rw: alibi)": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
        "num_kv_heads": 4,
    },
    "gpt_bigcode (not multi-query)": {"multi_query": False},
    "gpt2 (scaled by layer)": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "doge (MoE)": {"is_moe": True, "num_experts": 16, "keep_window_size": 6},
    "hunyuan_v1_moe (6 experts)": {"num_experts": 6, "moe_topk": 2},
    "granitemoeshared (no shared part)": {"shared_intermediate_size": 0},
    "lfm2 (only attention)": {"layer_types": ["full_attention"] * 4},
    "qwen2_moe (every second layer)": {"decoder_sparse_step": 2},
    "ernie4_5_moe (from layer 1)": {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "deepseek_v3 (no q_lora, groups)": {**MLA, "q_lora_rank": None, "n_group": 2, "topk_group": 1},
    "minimax_m3_vl_text (sparse attention)": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 2,
        "index_topk_blocks": 3,
    },
}


SPECIAL = {"+buffers"}
"""Keys that are no field of a config: +buffers names buffers that must not be trivial."""


def model_type_of(name: str) -> str:
    return name.partition(" (")[0]


NO_DECODERS = (
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert", "mvp", "pegasus", "plbart"),
    *("prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm"),
    *("xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "reformer"),
)
"""Encoders and encoder-decoders in the mapping. They are refused, and left out here."""


def all_names() -> list[str]:
    """Every type of the mapping of causal language models that is a decoder, and the variants above."""
    types = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NO_DECODERS]
    return [*types, *(name for name in OPTIONS if " (" in name)]


def has_parts(name: str) -> bool:
    """Whether a type has other parts beside its decoder, such as a vision tower."""
    parts = getattr(CONFIG_MAPPING[model_type_of(name)], "sub_configs", None) or {}
    return any(word in part for part in parts for word in ("text", "vision", "audio", "decoder", "encoder"))


def make_config(name: str) -> PreTrainedConfig:
    config_class: Any = CONFIG_MAPPING[model_type_of(name)]
    changes = {key: value for key, value in OPTIONS.get(name, {}).items() if key not in SPECIAL}
    for alias, own in (config_class.attribute_map or {}).items():
        if alias in changes and own not in changes:
            changes[own] = changes.pop(alias)
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {**{key: value for key, value in SMALL.items() if key in fields}, **changes}
    made: PreTrainedConfig = config_class(**{key: value for key, value in values.items() if value is not DROP})
    return made
