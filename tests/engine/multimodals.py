"""Tiny multimodal models of every type: what their configs need to be small, and what some of them need beside it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from blockpruner.engine.blocks import Kind, Mask

NUM_LAYERS, VOCABULARY = 4, 160

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 24, "num_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "sliding_window": 6,
    "shared_intermediate_size": 24, "initializer_range": 0.2,
}  # fmt: skip
SEEN = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "embed_dim": 32, "num_layers": 2, "head_dim": 8,
    "num_key_value_heads": 4, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "initializer_range": 0.2,
}  # fmt: skip
SPECIAL = {
    name: VOCABULARY - 1 - place
    for place, name in enumerate(
        ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
         "audio_token_index", "boi_token_index", "eoi_token_index", "vision_start_token_id", "vision_end_token_id")
    )
}  # fmt: skip


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}}


_HALF = _rope(1, 0, 1, partial_rotary_factor=0.5)
_SAM = {"output_channels": 16, "image_size": 64, "patch_size": 16, "mlp_dim": 48, "window_size": 2,
        "global_attn_indexes": [1]}  # fmt: skip
_MLA = {"num_key_value_heads": 4}
_SCALED = {"model_type": "cohere2", "logit_scale": 0.25}

_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
E2B = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True, "global_head_dim": 16, **_GLOBAL,
}  # fmt: skip
"""The text decoder of a small Gemma 4: layers are given values of the tokens, and the last two share keys."""
_DEEP = {"deepstack_visual_indexes": [0, 1, 2], "depth": 3}
"""What an image gives to the first layers of the text decoder, too."""

CHANGES: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config": _rope(2, 1, 1)}
        for name in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm_ocr", "qwen2_5_omni_thinker")
    },
    **{
        name: {"text_config": _rope(2, 1, 1), "vision_config": _DEEP}
        for name in ("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni")
    },
    **{name: {"text_config": _HALF} for name in ("glm4v", "glm46v", "glmga", "glm4v_moe")},
    "got_ocr2": {"vision_config": _SAM},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16, **_GLOBAL}
    },
    "gemma4_unified": {"text_config": _GLOBAL},
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}},
    "vipllava": {"vision_feature_layer": [1, 2]},
    **{name: {"image_grid_pinpoints": [[16, 16]]} for name in ("llava_next", "llava_next_video", "llava_onevision")},
    "mistral3": {"spatial_merge_size": 1},
    "kimi_k25": {"text_config": _MLA},
    **{name: {"text_config": _SCALED} for name in ("aya_vision", "cohere2_vision")},
    "paligemma": {
        "text_config": {"model_type": "gemma2", "final_logit_softcapping": 3.0},
        "projection_dim": 32,
        "vision_config": {"projection_dim": 32},
    },
    "granite_docling": {"text_config": {"logits_scaling": 4.0}},
}
"""By type, what parts of the config need beside the sizes. A `model_type` chooses another type of text decoder."""

RIGHT = (
    "aria", "aya_vision", "cohere2_vision", "cosmos3_omni", "deepseek_vl", "deepseek_vl_hybrid", "exaone4_5", "fuyu",
    "gemma3", "gemma4", "gemma4_unified", "lfm2_vl", "lfm3_vl", "llama4", "qwen3_5", "qwen3_5_moe", "minicpmv4_6",
    "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmasr", "glmga", "got_ocr2", "granite_docling",
    "granite_speech", "granite_speech_plus", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl",
    "kimi_k25", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "minimax_m3_vl",
    "mistral3", "moss_transcribe_diarize", "ovis2", "paddleocr_vl", "paligemma", "pp_chart2table", "qianfan_ocr",
    "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl",
    "qwen3_vl_moe", "smolvlm", "video_llama_3", "video_llava", "vipllava", "voxtral",
)  # fmt: skip
"""Types of which the text decoder is right, as docs/architectures.md says."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """changes: to the whole config, and by "text_config" and so on to its parts."""
    return _made(CONFIG_MAPPING[model_type], {**CHANGES.get(model_type, {}), **changes}, {**TEXT, **SPECIAL})


def tiny_multimodal(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model whose blocks, norms and biases all matter."""
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForMultimodalLM.from_config(config).parameters())
    if size > 60_000_000:
        raise ValueError(f"the model is not tiny: {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.12)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # trained ones are not 1
                buffer.fill_(0.7)
    return model.eval()


def write_multimodal(folder: Path, model_type: str, **changes: Any) -> Path:
    tiny_multimodal(model_type, **changes).save_pretrained(folder)
    return folder


def _made(config_class: Any, changes: dict[str, Any], sizes: dict[str, Any]) -> PreTrainedConfig:
    changes = dict(changes)
    known = {field.name for field in fields(config_class)}
    values = {name: size for name, size in sizes.items() if name in known}
    for part, spec in (config_class.sub_configs_defaults or {}).items():
        given = dict(changes.pop(part, {}))
        part_class = getattr(spec, "config_class", spec)
        if part_class is AutoConfig:
            part_class = CONFIG_MAPPING[given.pop("model_type", None) or spec.model_type]
        is_seen = any(word in part for word in ("vision", "audio", "vq", "acoustic", "semantic", "encoder"))
        values[part] = _made(part_class, given, SEEN if is_seen else TEXT)
    return config_class(**{**values, **changes})


def image_inputs(whole: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A text with an image in it, as the type's processor would give it."""
    config, generator = whole.config, torch.Generator().manual_seed(3)
    seen = config.vision_config
    if hasattr(seen, "spatial_merge_size") and hasattr(seen, "temporal_patch_size"):
        width = getattr(seen, "in_channels", 3) * seen.temporal_patch_size * seen.patch_size**2
        pixels = torch.randn(16, width, generator=generator)
        given = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    elif not hasattr(seen, "image_size"):  # Gemma 4: patches with their places
        width = 3 * getattr(seen, "model_patch_size", seen.patch_size) ** 2
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
        given = {"pixel_values": torch.rand(1, 36, width, generator=generator), "image_position_ids": places}
    else:
        tiles = {"idefics2": (1,), "idefics3": (1,), "smolvlm": (1,)}.get(config.model_type, ())
        if "image_grid_pinpoints" in vars(config):
            tiles = (2,)
        size = seen.image_size if isinstance(seen.image_size, int) else seen.image_size[0]
        given = {"pixel_values": torch.randn(1, *tiles, 3, size, size, generator=generator)}
        if config.model_type in ("mistral3", "lighton_ocr") or (len(tiles) and tiles[0] > 1):
            given["image_sizes"] = torch.tensor([[size, size]])
    with torch.inference_mode():
        length = _length(whole.get_image_features(**given))
    text = torch.randint(3, 140, (1, 8), generator=generator)
    ids = torch.cat([text[:, :3], torch.full((1, length), image_token(whole)), text[:, 3:]], dim=1)
    known = inspect.signature(type(whole).forward).parameters
    kinds = {name: (ids == image_token(whole)).long() for name in ("mm_token_type_ids", "token_type_ids")}
    return {"input_ids": ids, **given, **{name: kind for name, kind in kinds.items() if name in known}}


def image_token(whole: PreTrainedModel) -> int:
    found: int = getattr(whole.config, "image_token_id", None) or whole.config.image_token_index
    return found


def _length(features: Any) -> int:
    if isinstance(features, ModelOutput):
        pooled = features.get("pooler_output")
        return _length(features.last_hidden_state if pooled is None else pooled)
    if isinstance(features, list | tuple):
        return sum(map(_length, features))
    length: int = features.shape[:-1].numel()
    return length


MODULES = {Kind.MHA: ("self_attn", "linear_attn", "conv", "mamba"), Kind.MLP: ("mlp", "feed_forward")}


def _modules(layer: nn.Module, kind: Kind) -> list[nn.Module]:
    return [module for name, module in layer.named_children() if name in MODULES[kind]]


@contextmanager
def without(whole: PreTrainedModel, mask: Mask) -> Iterator[None]:
    """The whole model as it is, but what the mask's attentions and MLPs give is taken away."""
    layers = next(
        module
        for path, module in whole.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == NUM_LAYERS
        and all(all(_modules(layer, kind) for kind in MODULES) for layer in module)
        and not any(word in path for word in ("vision", "audio", "visual"))
    )

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for block in mask.absent:
            for module in _modules(layers[block.layer], block.kind):
                stack.callback(module.register_forward_hook(nothing).remove)
        yield
