"""The architectures of GGUF that are read here: what each field means in transformers' config, and how tensors differ.

A field that a family does not read is refused, so that nothing that changes the results is lost. Where a file is
silent, the defaults are llama.cpp's (src/models/*.cpp), which need not be those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.header import Content
from blockpruner.engine.model.from_gguf.keys import ADVICE, Keys
from blockpruner.engine.model.from_gguf.rope import FACTORS, LONG, SHORT, rope_parameters, with_factors

Config = dict[str, Any]
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
HARMLESS = ("general.", "tokenizer.", "split.", "quantize.", "mradermacher.")
"""Prefixes of fields that do not say what a model computes; the tokenizer's are read by themselves."""
STARCODER2_WINDOW = 4096
"""Tokens that StarCoder2 sees, in all sizes. llama.cpp's converter writes no field for it, and llama.cpp uses none."""


@dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str
    """The type in transformers."""
    config: Callable[[Keys, Content], Config]
    permuted: bool = False
    """Whether the rows of queries and keys are in an order in which heads rotate neighbours, not halves."""
    norms_plus_one: bool = False
    """Whether norms are stored with 1 added."""
    transposed: tuple[str, ...] = ()
    """Ends of the names of weights that transformers keeps the other way round."""
    into_config: tuple[str, ...] = ()
    """Tensors that become numbers of the config."""
    note: str = ""
    """What is said when a file is converted."""


def _sizes(keys: Keys, content: Content) -> Config:
    embedding = content.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"expected the matrix {EMBEDDING} in {keys.file!r}, which lacks it.")
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if not keys.has("attention.key_length") and hidden % heads:
        raise keys.refuse("attention.head_count", f"a divisor of {hidden}")
    head_dim = keys.integer("attention.key_length", max(hidden // heads, 1))
    if embedding.shape[1] != hidden:
        raise keys.refuse("embedding_length", f"{embedding.shape[1]}, the width of {EMBEDDING},")
    num_layers = keys.integer("block_count")
    if num_layers > len(content.tensors):
        raise keys.refuse("block_count", f"at most {len(content.tensors)}, the number of tensors,")
    keys.only("attention.value_length", head_dim)
    keys.only("attention.causal", True)
    keys.only("expert_count", 0)
    keys.only("expert_used_count", 0)
    keys.only("vocab_size", embedding.shape[0])
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": HEAD not in content.tensors,
    }


def _rotary(keys: Keys, content: Content) -> Config:
    """Sizes of a model with RMS norms whose heads rotate in full, and its RoPE."""
    sizes = _sizes(keys, content)
    keys.only("rope.dimension_count", sizes["head_dim"])
    return {
        **sizes,
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(keys, content, sizes["max_position_embeddings"]),
    }


def _llama(keys: Keys, content: Content) -> Config:
    config = _rotary(keys, content)
    return {
        **config,
        "rope_parameters": with_factors(config["rope_parameters"], keys, content, config["head_dim"]),
        "attention_bias": "blk.0.attn_q.bias" in content.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in content.tensors,
    }


def _granite(keys: Keys, content: Content) -> Config:
    config = _llama(keys, content)
    return {
        **config,
        "attention_multiplier": keys.real("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": keys.real("embedding_scale", 1.0),
        "residual_multiplier": keys.real("residual_scale", 1.0),
        "logits_scaling": keys.real("logit_scale", 1.0),
    }


def _qwen3(keys: Keys, content: Content) -> Config:
    return {**_rotary(keys, content), "attention_bias": "blk.0.attn_q.bias" in content.tensors}


def _gemma(keys: Keys, content: Content) -> Config:
    return {**_rotary(keys, content), "hidden_activation": "gelu_pytorch_tanh"}


def _attention_scalar(config: Config, layers_of_27b: int) -> int:
    """Return query_pre_attn_scalar, which llama.cpp knows by the number of layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _gemma2(keys: Keys, content: Content) -> Config:
    config = _gemma(keys, content)
    return {
        **config,
        "query_pre_attn_scalar": _attention_scalar(config, layers_of_27b=46),
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, config["num_hidden_layers"], every=2),
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys, content: Content) -> Config:
    config = _gemma(keys, content)
    num_layers, slides = config["num_hidden_layers"], keys.has("attention.sliding_window")
    near = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10000.0)}
    return {
        **config,
        "query_pre_attn_scalar": _attention_scalar(config, layers_of_27b=62),
        "sliding_window": keys.integer("attention.sliding_window", config["max_position_embeddings"]),
        "layer_types": _layer_types(keys, num_layers, every=6) if slides else ["full_attention"] * num_layers,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": near},
        "final_logit_softcapping": keys.real("final_logit_softcapping")
        if keys.has("final_logit_softcapping")
        else None,
    }


def _layer_types(keys: Keys, num_layers: int, every: int) -> list[str]:
    """Return which layers see only the sliding window: by the file, or all but one of `every`."""
    slides = keys.get("attention.sliding_window_pattern", every)
    if type(slides) is int and slides > 0:
        slides = [(index + 1) % slides != 0 for index in range(num_layers)]
    if not isinstance(slides, list) or len(slides) != num_layers or not all(isinstance(one, bool) for one in slides):
        raise keys.refuse("attention.sliding_window_pattern", f"a number or {num_layers} times true or false")
    return ["sliding_attention" if one else "full_attention" for one in slides]


def _phi3(keys: Keys, content: Content) -> Config:
    sizes = _sizes(keys, content)
    rotated = keys.integer("rope.dimension_count", sizes["head_dim"])
    if rotated > sizes["head_dim"]:
        raise keys.refuse("rope.dimension_count", f"at most {sizes['head_dim']}")
    rope = rope_parameters(keys, content, sizes["max_position_embeddings"])
    return {
        **sizes,
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {**rope, "partial_rotary_factor": rotated / sizes["head_dim"]},
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", sizes["max_position_embeddings"]
        ),
        # 0 says that there is none
        "sliding_window": keys.integer("attention.sliding_window", 0, least=0) or None,
    }


def _starcoder2(keys: Keys, content: Content) -> Config:
    sizes = _sizes(keys, content)
    keys.only("rope.dimension_count", sizes["head_dim"])
    return {
        **sizes,
        "norm_epsilon": keys.real("attention.layer_norm_epsilon"),
        "use_bias": "blk.0.attn_q.bias" in content.tensors,
        "rope_parameters": rope_parameters(keys, content, sizes["max_position_embeddings"]),
        # Up to these positions a model with the window and one without it are the same.
        "max_position_embeddings": min(sizes["max_position_embeddings"], STARCODER2_WINDOW),
        "sliding_window": None,
    }


def _stablelm(keys: Keys, content: Content) -> Config:
    sizes = _sizes(keys, content)
    rotated = keys.integer("rope.dimension_count", sizes["head_dim"])
    rope = rope_parameters(keys, content, sizes["max_position_embeddings"])
    return {
        **sizes,
        "layer_norm_eps": keys.real("attention.layer_norm_epsilon"),
        "use_qkv_bias": "blk.0.attn_q.bias" in content.tensors,
        "use_parallel_residual": keys.flag("use_parallel_residual", default=True),
        "rope_parameters": {**rope, "partial_rotary_factor": rotated / sizes["head_dim"]},
    }


def _gpt2(keys: Keys, content: Content) -> Config:
    sizes = _sizes(keys, content)
    return {
        "vocab_size": sizes["vocab_size"],
        "n_embd": sizes["hidden_size"],
        "n_inner": sizes["intermediate_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_head": sizes["num_attention_heads"],
        "n_positions": sizes["max_position_embeddings"],
        "layer_norm_epsilon": keys.real("attention.layer_norm_epsilon"),
        "tie_word_embeddings": sizes["tie_word_embeddings"],
    }


FAMILIES = {
    "llama": Family(model_type="llama", config=_llama, permuted=True, into_config=(FACTORS,)),
    "granite": Family(model_type="granite", config=_granite, permuted=True, into_config=(FACTORS,)),
    "qwen2": Family(model_type="qwen2", config=_rotary),
    "qwen3": Family(model_type="qwen3", config=_qwen3),
    "olmo2": Family(model_type="olmo2", config=_qwen3),
    "gemma": Family(model_type="gemma", config=_gemma, norms_plus_one=True),
    "gemma2": Family(model_type="gemma2", config=_gemma2, norms_plus_one=True),
    "gemma3": Family(model_type="gemma3_text", config=_gemma3, norms_plus_one=True),
    "phi3": Family(model_type="phi3", config=_phi3, into_config=(LONG, SHORT)),
    "starcoder2": Family(
        model_type="starcoder2",
        config=_starcoder2,
        note=f"a GGUF of StarCoder2 does not hold its sliding window of {STARCODER2_WINDOW:,} tokens, so the model is "
        f"read with as many positions; give its checkpoint folder for longer texts",
    ),
    "stablelm": Family(model_type="stablelm", config=_stablelm),
    "gpt2": Family(
        model_type="gpt2",
        config=_gpt2,
        transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    ),
}
"""By `general.architecture`."""


def family_of(content: Content, file: str) -> tuple[Family, Config]:
    """Return the family of a GGUF and its config. Raises UserError for what is no such model, and for fields that are
    not known."""
    general = Keys(content.fields, "general.", file)
    architecture = general.text("architecture")
    if architecture is None:
        raise UserError(f"expected a GGUF of a language model, got {file!r} without general.architecture.")
    if general.text("type", "model") != "model":
        raise general.refuse("type", "'model'")
    family = FAMILIES.get(architecture)
    if family is None:
        raise UserError(
            f"expected a GGUF of one of the architectures {', '.join(FAMILIES)}, got {file!r} of "
            f"{architecture[:40]!r}, which is not read here; {ADVICE}."
        )
    keys = Keys(content.fields, f"{architecture}.", file)
    config = family.config(keys, content)
    foreign = [name for name in content.fields if not name.startswith((*HARMLESS, keys.prefix))]
    if unknown := keys.left + foreign:
        raise UserError(
            f"expected a GGUF whose fields are all known here, got {file!r} with {unknown[0]} = "
            f"{repr(content.fields[unknown[0]][0])[:60]}, which may change what the model computes; {ADVICE}."
        )
    return family, config
