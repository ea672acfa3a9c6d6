"""GGUFs of tiny models, as llama.cpp's converter makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType as Value
from transformers import PreTrainedModel

ARCHITECTURES = {"gemma3_text": "gemma3"}
"""Names in GGUF by those of transformers, where they differ."""
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
LAYER_NORM_EPS = ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
Added = Mapping[str, Any]


def fields_of(model: PreTrainedModel) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config, without the name of the architecture before it."""
    config = model.config
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 4 * config.hidden_size if config.model_type == "gpt2" else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": next(
            (getattr(config, name) for name in LAYER_NORM_EPS if hasattr(config, name)), None
        ),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attention.scale": getattr(config, "attention_multiplier", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
        "logit_scale": getattr(config, "logits_scaling", None),
    }  # fmt: skip
    if (head_dim := getattr(config, "head_dim", None)) and config.model_type != "phi3":
        own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if rope := getattr(config, "rope_parameters", None):
        rope = rope.get("full_attention", rope)
        own["rope.freq_base"] = float(rope["rope_theta"])
        if (part := rope.get("partial_rotary_factor")) is not None:
            own["rope.dimension_count"] = int(part * config.hidden_size) // config.num_attention_heads
    if hasattr(config, "use_parallel_residual"):
        own["use_parallel_residual"] = config.use_parallel_residual
    return {name: value for name, value in own.items() if value is not None}


def tokenizer_fields(vocab_size: int) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>"] + [chr(97 + n % 26) * (1 + n // 26) for n in range(vocab_size - 3)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (vocab_size - 3),
        "tokenizer.ggml.merges": ["a a", "b b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def tensors_of(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, leaf = name.rpartition(".")
        theirs, values = f"{names.get_name(module)}.{leaf}", weight.float().numpy()
        if architecture.startswith("gemma") and theirs.endswith("norm.weight"):
            values = values + 1
        if architecture == "gpt2" and theirs.endswith(TRANSPOSED):
            values = values.T
        if architecture in ("llama", "granite") and (".attn_q." in theirs or ".attn_k." in theirs):
            heads = config.num_attention_heads if ".attn_q." in theirs else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        tensors[theirs] = np.ascontiguousarray(values)
    return tensors


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    *,
    own: Added | None = None,
    fields: Added | None = None,
    tensors: Added | None = None,
    without: Sequence[str] = (),
) -> Path:
    """Write a model in float32.

    own: more fields of the architecture, or other values. fields: the same by full names. tensors: more tensors.
    without: fields and tensors to leave out.
    """
    architecture = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    mine = {f"{architecture}.{name}": value for name, value in {**fields_of(model), **(own or {})}.items()}
    found = {**mine, **tokenizer_fields(model.config.vocab_size), **(fields or {})}
    return write(file, architecture, found, {**tensors_of(model), **(tensors or {})}, without)


def write(file: Path, architecture: str, fields: Added, tensors: Added, without: Sequence[str] = ()) -> Path:
    writer = gguf.GGUFWriter(file, str(fields.get("general.architecture", architecture)))
    for name, value in fields.items():
        if name not in without and name != "general.architecture":
            _add(writer, name, value)
    for name, values in tensors.items():
        if name not in without:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_parts(model: PreTrainedModel, folder: Path, count: int) -> list[Path]:
    """Write a model in parts, the metadata in the first, as llama-gguf-split does."""
    architecture, tensors = model.config.model_type, list(tensors_of(model).items())
    own = {f"{architecture}.{name}": value for name, value in fields_of(model).items()}
    parts = []
    for number in range(count):
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        fields = {**own, **tokenizer_fields(model.config.vocab_size), **split} if number == 0 else split
        file = folder / f"tiny-{number + 1:05}-of-{count:05}.gguf"
        parts.append(write(file, architecture, fields, dict(tensors[number::count])))
    return parts


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    kinds = {bool: Value.BOOL, int: Value.UINT32, float: Value.FLOAT32, str: Value.STRING}
    if isinstance(value, list):
        item = Value.INT32 if isinstance(value[0], int) and not isinstance(value[0], bool) else kinds[type(value[0])]
        writer.add_key_value(name, value, Value.ARRAY, item)
    else:
        writer.add_key_value(name, value, kinds[type(value)])
