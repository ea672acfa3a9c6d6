"""Models without files: random Llamas, whose weights are made on the device, and a tokenizer and a text for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from blockpruner.engine.calibration import read_rows
from blockpruner.engine.model.loading import DTYPES, load_model, load_tokenizer, materialize
from blockpruner.engine.sections import ModelSource

SHAPES = {
    "random-tiny": (64, 176, 6, 4, 2, 1000),
    "random-1b": (2048, 5632, 22, 32, 4, 32000),
    "random-7b": (4096, 11008, 32, 32, 32, 32000),
}
"""Hidden size, width of the MLP, layers, heads, KV heads and vocabulary."""
NUM_ROWS = 600


def make(name: str, dtype: str, device: str) -> PreTrainedModel:
    """Return a random model, the same on every call on the same kind of device."""
    hidden, width, num_layers, heads, kv_heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=num_layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096, initializer_range=0.03,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()


def write(name: str, dtype: str, device: str, dense: Path, text: Path) -> None:
    """Write a model with a tokenizer, and a text for it."""
    rows = read_rows("builtin", "text", train=True)
    texts = [rows[index % len(rows)] for index in range(NUM_ROWS)]
    text.write_text("".join(json.dumps({"text": f"{index}. {row}"}) + "\n" for index, row in enumerate(texts)))
    if name in SHAPES:
        model, tokenizer = make(name, dtype, device), _tokenizer(texts)
    else:
        source = materialize(ModelSource(name), dtype)
        model, tokenizer = load_model(source, dtype), load_tokenizer(source)
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size=900, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, bos_token="<s>", eos_token="</s>")
