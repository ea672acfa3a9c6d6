"""Shapes of well-known models, to plan a search without the model's files and without a network."""

from __future__ import annotations

import re

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, positions: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=positions,
    )


def _qwen(hidden: int, mlp: int, layers: int, heads: int, vocab: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=32768,
    )


def _mistral(vocab: int) -> MistralConfig:
    return MistralConfig(
        num_key_value_heads=8, intermediate_size=14336, vocab_size=vocab, max_position_embeddings=32768
    )


# Baichuan2 fuses its query, key and value projections and normalises its head, but has the sizes of a Llama.
KNOWN_MODELS = {
    "meta-llama/Llama-2-7b-hf": lambda: _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": lambda: _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "meta-llama/Llama-2-70b-hf": lambda: _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B": lambda: _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "meta-llama/Meta-Llama-3-70B": lambda: _llama(8192, 28672, 80, 64, 8, 128256, 8192),
    "Qwen/Qwen1.5-7B": lambda: _qwen(4096, 11008, 32, 32, 151936),
    "Qwen/Qwen1.5-14B": lambda: _qwen(5120, 13696, 40, 40, 152064),
    "baichuan-inc/Baichuan2-7B-Base": lambda: _llama(4096, 11008, 32, 32, 32, 125696, 4096),
    "baichuan-inc/Baichuan2-13B-Base": lambda: _llama(5120, 13696, 40, 40, 40, 125696, 4096),
    "mistralai/Mistral-7B-v0.1": lambda: _mistral(32000),
    "mistralai/Mistral-7B-v0.3": lambda: _mistral(32768),
}
"""Configs by hub id. The part after the slash, with or without -hf, -Base, Meta- and -v0.1, also identifies a model."""


def known_config(name: str) -> PreTrainedConfig | None:
    """Return the config of a well-known model, or None for any other name."""
    for hub_id, make in KNOWN_MODELS.items():
        if _plain(name) in map(_plain, (hub_id, hub_id.partition("/")[2], _short(hub_id))):
            return make()
    return None


def _plain(name: str) -> str:
    """Normalise a name, so that Llama2-7B equals llama-2-7b."""
    return re.sub(r"[^a-z0-9./]", "", name.lower())


def short_names() -> list[str]:
    return [_short(hub_id) for hub_id in KNOWN_MODELS]


def _short(hub_id: str) -> str:
    name = hub_id.lower().partition("/")[2].removeprefix("meta-")
    return name.removesuffix("-hf").removesuffix("-base").removesuffix("-v0.1")
