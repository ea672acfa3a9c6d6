"""Remove blocks from the text decoder of a multimodal model and leave the rest of the model as it is."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.classes.whole import whole_classes
from blockpruner.engine.model.multimodal import decoder_path, text_part
from blockpruner.engine.model.surgery import Group, copy_buffers, pruned_values, source_name
from blockpruner.engine.model.ties import is_tied

WITH_IMAGES = frozenset((
    "aya_vision", "cohere2_vision", "cosmos3_omni", "exaone4_5", "gemma3", "gemma4", "gemma4_unified", "glm46v",
    "glm4v", "glm4v_moe", "glm_ocr", "glmga", "got_ocr2", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl",
    "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "ovis2", "paligemma",
    "pp_chart2table", "qianfan_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "video_llava",
    "vipllava",
))  # fmt: skip
"""Types of which it was shown that the pruned form answers about an image as the whole model does whose blocks give
nothing (tests/engine/test_whole.py)."""
NOT_CARRIED = ("model_type", "architectures", "_name_or_path", "transformers_version", "auto_map")
"""What a config says of the model that it was read for."""
DENSE = Mask()


def check_whole(model_type: str, mask: Mask = DENSE) -> None:
    """Raise UserError for a multimodal type whose pruned form is not known to be right with an image, and for a mask
    with groups."""
    if mask.lacking:
        raise UserError(
            "expected `text_only` for a multimodal model whose blocks lack some of their groups, which is only written "
            "as its text decoder."
        )
    if model_type not in WITH_IMAGES:
        raise UserError(
            f"a multimodal model of type {model_type!r} cannot be written as a whole without blocks, since it was not "
            f"shown that it answers about images then; use `text_only` for its text decoder alone."
        )


def prune_whole(whole: PreTrainedModel, text: PreTrainedModel, pruned: PreTrainedModel) -> PreTrainedModel:
    """Return a multimodal model whose text decoder lacks blocks. Its weights are the whole model's own tensors.

    text: the text decoder of `whole` as a language model. pruned: the same without blocks.
    """
    check_whole(whole.config.model_type)
    path, config, architecture = decoder_path(whole), whole.config, architecture_of(text)
    decoder = whole.get_submodule(path)
    text_key = next(key for key, value in vars(config).items() if value is text_part(config))
    classes = whole_classes(whole, path, text_key, architecture)
    groups: list[Group] = pruned.config.block_groups
    before = text.config.to_dict()
    changed = {key: value for key, value in pruned.config.to_dict().items() if key not in before}
    values = {**changed, **pruned_values(decoder.config, groups)}
    made_text = classes.text_config(**{key: value for key, value in values.items() if key not in NOT_CARRIED})
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_CARRIED}
    made_config = classes.config(**{**values, text_key: made_text, "tie_word_embeddings": is_tied(whole)})
    _take_implementations(config, made_config)
    with torch.device("meta"), no_init_weights():
        made = classes.model(made_config)
    _take_implementations(config, made.config)
    layers = architecture.layers.partition(".")[2]

    def source(name: str) -> str:
        within = name.removeprefix(f"{path}.")
        return name if within == name else f"{path}.{source_name(within, layers, groups)}"

    weights = {**dict(whole.named_buffers(remove_duplicate=False)), **whole.state_dict()}
    made.load_state_dict({name: weights[source(name)] for name in made.state_dict()}, assign=True)
    made.tie_weights()
    copy_buffers(whole, made, source)
    made.generation_config = whole.generation_config
    return made.eval()


def _take_implementations(old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Compute attention and experts, in every part, in the way in which the whole model does."""
    for name, value in vars(old).items():
        if isinstance(value, PreTrainedConfig):
            _take_implementations(value, getattr(new, name))
        elif name.startswith("_") and name.endswith("_implementation_internal"):
            setattr(new, name, value)
