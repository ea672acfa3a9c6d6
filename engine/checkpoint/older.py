"""Keys of config.json that programs older than transformers 5 read: transformers 4, vLLM, llama.cpp's converter.

transformers 5 writes only `rope_parameters` and `dtype`. Without `rope_theta` and `rope_scaling` older programs compute
with default frequencies, without a word.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from blockpruner.engine.model.architectures import PRUNED_PREFIX

FULL, SLIDING = "full_attention", "sliding_attention"
BESIDE = ("rope_theta", "partial_rotary_factor")
"""Parameters of RoPE that older programs read beside `rope_scaling`, not in it."""
FEW_FIELDS = {
    **dict.fromkeys(("phi3", "phi4_multimodal"), ("type", "short_factor", "long_factor")),
    **dict.fromkeys(("olmo", "olmo2"), ("type", "factor")),
}
"""Fields of `rope_scaling` of types that refuse any further one."""
OTHER_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
}


def add_older_keys(folder: Path) -> None:
    """Add to config.json of a written checkpoint what older programs read. Keys that are there already stay."""
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**older_keys(values), **values}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return the older keys that say the same as `rope_parameters` and `dtype` of a config."""
    older: dict[str, Any] = {}
    if values.get("dtype") is not None:
        older["torch_dtype"] = values["dtype"]
    model_type = str(values.get("model_type", "")).removeprefix(PRUNED_PREFIX)
    if model_type == "qwen3_moe" and "num_local_experts" in values:
        older["num_experts"] = values["num_local_experts"]
    if model_type == "gpt2" and "n_positions" in values:
        older["n_ctx"] = values["n_positions"]
    rope = values.get("rope_parameters")
    if not rope:
        return older
    by_type = FULL in rope or SLIDING in rope
    whole = (rope.get(FULL) or rope[SLIDING]) if by_type else rope
    frequencies: dict[str, Any] = {key: whole[key] for key in BESIDE if whole.get(key) is not None}
    if by_type and rope.get(SLIDING):
        frequencies["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
    frequencies["rope_scaling"] = _scaling(whole, model_type)
    if not _are_passed_over(frequencies, rope, model_type):
        return older
    older |= frequencies
    if whole.get("rope_type") == "longrope" and whole.get("original_max_position_embeddings") is not None:
        older["original_max_position_embeddings"] = whole["original_max_position_embeddings"]
    names = OTHER_NAMES.get(model_type, {})
    return {**older, **{name: older[key] for key, name in names.items() if key in older}}


def _are_passed_over(older: dict[str, Any], rope: dict[str, Any], model_type: str) -> bool:
    """Whether transformers 5 reads `rope_parameters` of layer types with older keys beside them. Types that are younger
    than these keys take them for `rope_parameters`; no older program reads such a type."""
    by_type = {name for name, value in rope.items() if isinstance(value, dict)}
    if model_type not in CONFIG_MAPPING or not by_type:
        return True
    try:
        read = CONFIG_MAPPING[model_type](**copy.deepcopy({"rope_parameters": rope, **older})).rope_parameters
    except Exception:  # it refuses what it takes them for
        return False
    return read is not None and all(isinstance(read.get(name), dict) for name in by_type)


def _scaling(rope: dict[str, Any], model_type: str) -> dict[str, Any] | None:
    """Return `rope_scaling`: None for plain RoPE. Its type has two names, because programs read either."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {key: value for key, value in rope.items() if key not in BESIDE} | {"type": kind}
    if isinstance(scaling.get("factor"), int):
        scaling["factor"] = float(scaling["factor"])  # older programs refuse whole numbers
    fields = FEW_FIELDS.get(model_type)
    return scaling if fields is None else {key: scaling[key] for key in fields if key in scaling}
