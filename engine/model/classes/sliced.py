"""Models with a narrower stream (SliceGPT): own classes, with a small modelling file next to the weights.

A checkpoint loads like one in the grouped layout. `grouped.write_checkpoint` writes it.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from string import Template

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from blockpruner.engine.json_files import parse_json, read_bytes
from blockpruner.engine.model.classes.pruned import PrunedClasses, import_source, register

SLICED_PREFIX = "sliced_"
"""Prefix of the `model_type` of sliced models."""
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Model types that can be sliced, and the prefix of their class names. Their layers have the same structure: norm,
attention, add to the stream; norm, MLP, add to the stream."""


def empty_sliced(model: PreTrainedModel, width: int) -> PreTrainedModel:
    """Return the sliced form of a dense model on the meta device: parameters have shapes but no values."""
    dense = model.config
    classes = _sliced_classes(dense.model_type)
    values = dense.to_dict()
    for key in ("model_type", "architectures", "_name_or_path", "transformers_version", "auto_map"):
        values.pop(key, None)
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    # The head reads the whole width, so it cannot share the embedding's weights.
    ours = {"sliced_size": width, "head_dim": head_dim, "tie_word_embeddings": False}
    config = classes.config(**{**values, **ours})
    config._attn_implementation = dense._attn_implementation
    with torch.device("meta"), no_init_weights():
        return classes.model(config)


def register_sliced(folder: Path) -> None:
    """Register the classes of a sliced checkpoint with the Auto classes. They are generated from the template, so no
    code from the folder runs. Has no effect for other folders."""
    values = parse_json(read_bytes(folder / "config.json"))
    model_type = str(values.get("model_type", "")) if isinstance(values, dict) else ""
    if model_type.startswith(SLICED_PREFIX) and model_type.removeprefix(SLICED_PREFIX) in FAMILIES:
        _sliced_classes(model_type.removeprefix(SLICED_PREFIX))


def _sliced_classes(model_type: str) -> PrunedClasses:
    family = FAMILIES[model_type]
    template = importlib.resources.files("blockpruner.engine.model.classes").joinpath("modeling_sliced.template")
    source = Template(template.read_text(encoding="utf-8")).substitute(model_type=model_type, family=family)
    module = import_source(f"modeling_{SLICED_PREFIX}{model_type}", source, [])
    classes = PrunedClasses(getattr(module, f"Sliced{family}Config"), getattr(module, f"Sliced{family}ForCausalLM"))
    register(classes.config, classes.model)
    return classes
