"""Whether the text decoder of a multimodal model, as a language model of its own, gives the logits that the whole model
gives for a text. Tried on a copy, before any weights are read.

The copy has the model's own code, but few layers, narrow MLPs and random weights; its other parts have none. So it
shows what the classes compute; that they have the same tensors is checked on the model itself (multimodal.py).
"""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.few_layers import set_vocab_size, with_few_layers
from blockpruner.engine.model.multimodal import (
    PLAIN_HEAD,
    decoder_path,
    not_supported,
    text_config,
    text_decoder,
    text_part,
)
from blockpruner.engine.model.rehearsal import NUM_LAYERS, VOCABULARY, fill

REACH = ("sliding_window", "attention_chunk_size")
"""Values that say how far back tokens see, so that a copy must have smaller ones to show a difference."""
NUM_SEQUENCES, NUM_TOKENS, NEAR = 2, 8, 3
NARROW = 64
"""Width of the copy's MLPs, which would take most of the time."""
LARGE = 30.0
"""Factor of the head's weights, so that limits of the logits show."""
ROUNDING = 1e-5
"""Largest difference, in standard deviations of the logits. Nearly all types give the same bits; some tell torch in
other words which tokens are seen, and it then adds in another order."""


def checked_text_config(whole: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the config of a multimodal model's text decoder, with which it gives the logits of the whole model for a
    text. Raises UserError with the model's type if there is none.

    name: the folder or hub id, for messages.
    """
    found = text_config(whole, name)
    scales = {key: getattr(found, key) for key in PLAIN_HEAD if hasattr(found, key)}
    is_plain = all(value == PLAIN_HEAD[key] for key, value in scales.items())
    described = copy.deepcopy(whole)
    described._name_or_path = ""
    why = ""
    for plain_head in (False,) if is_plain else (False, True):
        why = _difference(_Described(described), plain_head)
        if not why:
            return text_config(whole, name, plain_head=plain_head)
    raise not_supported(whole, name, why)


class _Described:
    """A config that is equal to another one with the same values."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.text = config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and type(self.config) is type(other.config) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=64)
def _difference(described: _Described, plain_head: bool) -> str:
    """Return how the text decoder differs from the whole model, or an empty string."""
    whole = described.config
    full = whole.get_text_config(decoder=True).vocab_size
    why = ""
    for vocab_size in dict.fromkeys((min(VOCABULARY, full), full)):  # some want their special tokens in the vocabulary
        try:
            why = _tried(_small(whole, vocab_size), plain_head)
        except UserError as error:
            why = str(error).partition("can be taken: ")[2].removesuffix(".") or str(error)
        except Exception as error:  # few layers may be too few, configs may hold anything
            why = f"a small copy fails with {type(error).__name__} ({first_line(error)[:200]})"
        if not why:
            return ""
    return why


def _small(whole: PreTrainedConfig, vocab_size: int) -> PreTrainedConfig:
    """Return the config of the copy."""
    small = copy.deepcopy(whole)
    text = text_part(small)
    assert text is not None
    few = with_few_layers(text, NUM_LAYERS)
    set_vocab_size(few, vocab_size)
    if (getattr(few, "pad_token_id", None) or 0) >= vocab_size:
        few.pad_token_id = 0
    for key in REACH:
        if isinstance(getattr(few, key, None), int):
            setattr(few, key, NEAR)
    for key, value in vars(few).items():
        if "intermediate_size" in key and isinstance(value, int | list):
            setattr(few, key, min(NARROW, value) if isinstance(value, int) else [min(NARROW, each) for each in value])
    place = next(key for key, value in vars(small).items() if value is text)
    setattr(small, place, few)
    small.tie_word_embeddings = few.tie_word_embeddings = False  # so that the head's weights can be larger
    return small


@torch.inference_mode()
def _tried(small: PreTrainedConfig, plain_head: bool) -> str:
    with init_empty_weights(include_buffers=False):
        whole = AutoModelForMultimodalLM.from_config(small, dtype=torch.float32)
    config = text_config(small, "", plain_head=plain_head)
    head = whole.get_output_embeddings()
    _fill_rest(whole)
    fill(nn.ModuleList([whole.get_submodule(decoder_path(whole)), head]))
    head.weight = nn.Parameter(LARGE * head.weight, requires_grad=False)
    text = text_decoder(whole.eval(), config, "")
    ids = _ids(small, config.vocab_size)
    expected, got = _logits(whole, ids), _logits(text, ids)
    difference, spread = (expected - got).abs().max(), expected.std()
    if difference <= ROUNDING * spread:
        return ""
    return (
        f"as a model of type {config.model_type!r} it gives other logits than the whole model (difference "
        f"{difference / spread:.2g} standard deviations)"
    )


def _fill_rest(whole: PreTrainedModel) -> None:
    """Give what is never computed weights that take no memory, so that the model says that it is on a CPU."""
    for module in whole.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                nothing = torch.zeros(()).expand(weight.shape)
                module._parameters[name] = nn.Parameter(nothing, requires_grad=False)


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _ids(small: PreTrainedConfig, vocab_size: int) -> torch.Tensor:
    """Return tokens of text: none that stands for an image, a sound or their ends."""
    values = [value for key, value in small.to_dict().items() if "token" in key and isinstance(value, int)]
    plain = torch.tensor([token for token in range(vocab_size) if token not in values])
    generator = torch.Generator().manual_seed(0)
    return plain[torch.randint(len(plain), (NUM_SEQUENCES, NUM_TOKENS), generator=generator)]
