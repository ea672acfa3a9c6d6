"""What a config and a tokenizer become in a GGUF: metadata, and the factors of the rotary frequencies."""

from __future__ import annotations

import json
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType as Value
from transformers import PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.header import Fields
from blockpruner.engine.model.from_gguf.pre_tokenizers import DIGITS, PRE_TOKENIZERS

WRITTEN_PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
"""Those of the known pre-tokenizers that are recognised in a tokenizer and written by name."""


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Return the divisor of each rotary frequency, float32 [head_dim / 2], or None for plain RoPE."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(f"the gguf format cannot express RoPE of type {kind!r}; use `format=grouped`.")
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    head_dim = head_dim_of(config)
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    return (plain / frequencies.numpy()).astype(np.float32)


def metadata(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> Fields:
    """Return the metadata of a Llama-like model and its tokenizer, but for what depends on the remaining blocks. Raises
    UserError for a tokenizer that llama.cpp does not know by name."""

    def number(value: int) -> tuple[Any, Value, None]:
        return value, Value.UINT32, None

    def real(value: float) -> tuple[Any, Value, None]:
        return value, Value.FLOAT32, None

    fields: Fields = {
        "general.architecture": ("llama", Value.STRING, None),
        "general.type": ("model", Value.STRING, None),
        "general.quantization_version": number(gguf.GGML_QUANT_VERSION),
        "llama.context_length": number(config.max_position_embeddings),
        "llama.embedding_length": number(config.hidden_size),
        "llama.vocab_size": number(config.vocab_size),
        "llama.rope.freq_base": real(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": real(config.rms_norm_eps),
    }
    return fields | _tokenizer_fields(tokenizer, config.vocab_size)


def _tokenizer_fields(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Fields:
    """Return the metadata of a byte-level BPE tokenizer whose pre-tokenizer has a name in llama.cpp. Raises UserError
    for other tokenizers."""
    if tokenizer is None or not tokenizer.is_fast:
        raise UserError("expected a checkpoint with a fast tokenizer; give the dense model's GGUF with `base`.")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(description)
    ids = {index: text for text, index in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in description["added_tokens"]}
    kinds = [
        gguf.TokenType.UNUSED if index not in ids
        else gguf.TokenType.NORMAL if index not in special
        else gguf.TokenType.CONTROL if special[index]
        else gguf.TokenType.USER_DEFINED
        for index in range(vocab_size)
    ]  # fmt: skip
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    texts = [ids.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    fields: Fields = {
        "tokenizer.ggml.model": ("gpt2", Value.STRING, None),
        "tokenizer.ggml.pre": (pre, Value.STRING, None),
        "tokenizer.ggml.tokens": (texts, Value.ARRAY, Value.STRING),
        "tokenizer.ggml.token_type": (list(map(int, kinds)), Value.ARRAY, Value.INT32),
        "tokenizer.ggml.merges": (merges, Value.ARRAY, Value.STRING),
    }
    for name, token in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if token is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = (token, Value.UINT32, None)
    ids_of_text = tokenizer("a")["input_ids"]
    fields["tokenizer.ggml.add_bos_token"] = (ids_of_text[:1] == [tokenizer.bos_token_id], Value.BOOL, None)
    fields["tokenizer.ggml.add_eos_token"] = (ids_of_text[-1:] == [tokenizer.eos_token_id], Value.BOOL, None)
    if isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = (tokenizer.chat_template, Value.STRING, None)
    return fields


def _pre_tokenizer(description: dict[str, Any]) -> str:
    """Return the name of a tokenizer's pre-tokenizer in llama.cpp."""
    pre = description["pre_tokenizer"] or {"type": None}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if description["model"]["type"] == "BPE" and steps[-1]["type"] == "ByteLevel" and len(steps) <= 2:
        normalizer = description["normalizer"] or {"type": "NFC"}  # llama.cpp has none, and leaves out Qwen2's NFC
        if steps[-1].get("add_prefix_space") or normalizer["type"] != "NFC":
            raise UserError(
                "expected a tokenizer that changes no text before it splits it, got one that adds a space or "
                "normalises, which llama.cpp does not; use `format=grouped`."
            )
        split = None
        if len(steps) == 2:
            is_digits = steps[0]["type"] == "Digits" and steps[0]["individual_digits"]
            split = DIGITS if is_digits else steps[0].get("pattern", {}).get("Regex")
        by_regex = steps[-1].get("use_regex", True)
        for name in WRITTEN_PRE_TOKENIZERS:
            rule = PRE_TOKENIZERS[name]
            if split == rule.split and by_regex == (rule.split is None or rule.then_gpt2):
                return name
    raise UserError(
        "expected a byte-level BPE tokenizer with a pre-tokenizer that llama.cpp knows by name, got another one; give "
        "the dense model's GGUF with `base` to use its tokenizer."
    )
