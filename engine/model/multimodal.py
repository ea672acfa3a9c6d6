"""Multimodal models: their text decoder as a language model of its own, made of the whole model's tensors.

Most text decoders have a causal language model of their own in transformers. Others are those of another type with
further names for the same layers: a row says which. Whether a decoder taken out so gives the logits of the whole model
for a text is tried on a copy (multimodal_check.py), whatever the rows say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.surgery import copy_buffers
from blockpruner.engine.model.ties import is_tied

OTHER_SENSES = ("vision_config", "audio_config")
"""What the configs of multimodal models have beside that of their text decoder."""
PLAIN_HEAD = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""Values with which a causal language model gives what its head gives, as many multimodal models do."""


@dataclass(frozen=True)
class TextType:
    """Which causal language model has the layers of a text decoder."""

    model_type: str
    changes: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    """What must be said in the config that goes without saying in the text decoder's."""


def _own_head_size(config: PreTrainedConfig) -> dict[str, Any]:
    return {"head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}


def _biases(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": config.use_bias, "mlp_bias": config.use_bias}


TEXT_TYPES = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"), TextType("qwen2")),
    "qwen3_vl_text": TextType("qwen3"),
    **dict.fromkeys(
        ("qwen3_vl_moe_text", "qwen3_omni_moe_text"), TextType("qwen3_moe", lambda config: {"norm_topk_prob": True})
    ),
    "glm4v_text": TextType("glm4", _own_head_size),
    "glm_ocr_text": TextType("glm4", lambda config: {**_own_head_size(config), "attention_bias": False}),
    "glm4v_moe_text": TextType("glm4_moe"),
    "paddleocr_vl_text": TextType("llama", _biases),
    "granite_docling_text": TextType("granite"),
}
"""Text decoders that have no causal language model of their own name. Tensors have the same names in both."""


def text_part(whole: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the config of the text decoder within that of a whole model, itself if the model is nothing else, or None
    if there are several."""
    try:
        return whole.get_text_config(decoder=True)
    except ValueError:
        return None


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a model has more than a decoder of text. Encoder-decoders are judged elsewhere."""
    if config.is_encoder_decoder:
        return False
    return text_part(config) is not config or any(getattr(config, key, None) is not None for key in OTHER_SENSES)


def text_config(whole: PreTrainedConfig, name: str, *, plain_head: bool = False) -> PreTrainedConfig:
    """Return the config of a multimodal model's text decoder as a causal language model. Raises UserError if there is
    none.

    name: the folder or hub id, for messages. plain_head: the whole model gives what its head gives, whatever the text
    decoder's config says of scales.
    """
    text = text_part(whole)
    if text is None or text is whole or type(whole) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        raise not_supported(whole, name, "transformers cannot load its text decoder alone")
    row = TEXT_TYPES.get(text.model_type)
    if row is not None:
        try:
            made = _config_of(text, row)
        except Exception as error:  # configs may hold anything, and transformers checks each type in its own way
            raise not_supported(
                whole,
                name,
                f"its config is none of type {row.model_type!r} ({type(error).__name__}: {first_line(error)[:200]})",
            ) from error
    elif type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        made = copy.deepcopy(text)
    else:
        raise not_supported(whole, name, f"transformers has no causal language model for its {text.model_type!r}")
    says = [getattr(config, "tie_word_embeddings", None) for config in (whole, text)]
    made.tie_word_embeddings = bool(next((tied for tied in says if tied is not None), False))
    made.dtype = whole.dtype or text.dtype
    made._name_or_path = whole.name_or_path
    if plain_head:
        for key, value in PLAIN_HEAD.items():
            if hasattr(made, key):
                setattr(made, key, value)
    return made


def _config_of(text: PreTrainedConfig, row: TextType) -> PreTrainedConfig:
    values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    # Runtimes would look for positions of images if the text decoder still spoke of them.
    rope = {key: value for key, value in text.rope_parameters.items() if not key.startswith("mrope")}
    return CONFIG_MAPPING[row.model_type](**{**values, "rope_parameters": rope, **row.changes(text)})


def not_supported(whole: PreTrainedConfig, name: str, why: str) -> UserError:
    return UserError(
        f"expected a language model, got {name!r}, a multimodal model of type {whole.model_type!r}, of which no text "
        f"decoder can be taken: {why}."
    )


def decoder_path(whole: PreTrainedModel) -> str:
    """Return the path of the text decoder in a multimodal model, with its head if the two are one module."""
    decoder = whole.get_decoder()
    return next(path for path, module in whole.named_modules() if module is decoder)


def text_decoder(whole: PreTrainedModel, config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Return the text decoder of a multimodal model as a causal language model with the given config, from
    `text_config`. Its weights are the whole model's own tensors, not copies; `multimodal_type` says of what it is.

    Raises UserError unless every tensor of the decoder and of the head has its place, and every place its tensor.
    """
    with torch.device("meta"), no_init_weights():
        text = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
    starts = _starts(text, whole)

    def source(of_text: str) -> str:
        """The name in the whole model of a tensor of the text decoder."""
        start = next((start for start in starts if of_text.startswith(start)), None)
        return of_text if start is None else starts[start] + of_text.removeprefix(start)

    weights, places = whole.state_dict(), {key: source(key) for key in text.state_dict()}
    owned = {key for key in weights if key.startswith(tuple(starts.values()))}
    odd = owned.symmetric_difference(places.values()) or {
        place for key, place in places.items() if weights[place].shape != text.state_dict()[key].shape
    }
    if odd:
        why = f"its tensors are not those of a model of type {config.model_type!r} ({sorted(odd)[0]!r})"
        raise not_supported(whole.config, name, why)
    text.load_state_dict({key: weights[place] for key, place in places.items()}, assign=True)
    text.config.tie_word_embeddings = is_tied(whole.get_submodule(starts[""][:-1]) if "" in starts else whole)
    text.tie_weights()
    copy_buffers(whole, text, source)
    text.generation_config = whole.generation_config
    text.multimodal_type = whole.config.model_type
    return text.eval()


def _starts(text: PreTrainedModel, whole: PreTrainedModel) -> dict[str, str]:
    """Return how names of tensors begin in the text decoder, each with how the same ones begin in the whole model."""
    path = f"{decoder_path(whole)}."
    if whole.get_decoder().get_output_embeddings() is not None:
        return {"": path}
    heads = [
        next(place for place, module in model.named_modules() if module is model.get_output_embeddings())
        for model in (text, whole)
    ]
    return {f"{heads[0]}.": f"{heads[1]}.", f"{text.base_model_prefix}.": path}
