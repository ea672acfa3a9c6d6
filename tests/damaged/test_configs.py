"""Whatever a config.json says, a model is taken with sound values or refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import PRUNED_PREFIX
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.loading import load_model, materialize, meta_model
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.sections import ModelSource
from tests.conftest import TINY, tiny_llama

KEYS = (
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_parameters", "rope_scaling", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "dtype",
    "torch_dtype", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "initializer_range",
    "use_cache", "auto_map", "quantization_config", "text_config", "vision_config", "is_encoder_decoder",
    "transformers_version", "pretraining_tp", "layer_types", "sliding_window", "n_embd", "n_layer", "n_head",
    "attn_implementation", "_attn_implementation", "num_local_experts", "num_experts", "num_experts_per_tok",
    "multi_query", "new_decoder_architecture", "activation_function", "is_decoder", "id2label", "torchscript",
    "per_layer_config", "transformers_weights", "moe_intermediate_size", "partial_rotary_factor",
)  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 4, 5, 7, 8, 16, 32, 48, 64, 2**31, 10**30, 0.5, -0.0, 1e-300, 1e300, math.nan, math.inf]
WORDS = ["", "four", "auto", "float8_e4m3fn", "bfloat16", "int8", "gelu", "llama", "\n", "../x", "é\ud800"]
OBJECTS = [
    {"rope_type": "linear"}, {"rope_type": "yarn", "factor": 0}, {"rope_theta": -1.0}, {"quant_method": "gptq"},
    {"AutoConfig": "x.Y"}, {"a": 1}, {}, [], [1], [None, "x"], ["full_attention"] * 3,
]  # fmt: skip
LEAVES = st.sampled_from([*NUMBERS, *WORDS, *OBJECTS, True, False, None])
VALUES = st.recursive(
    LEAVES | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=4,
)
PRUNED_KEYS = (
    "block_groups",
    "source_lists",
    "source_num_hidden_layers",
    "auto_map",
    "num_hidden_layers",
    "model_type",
)
LAYERS = st.lists(st.integers(-1, 5), max_size=2)
GROUPS = st.fixed_dictionaries(
    {"pre": LAYERS, "attention": st.integers(-1, 4), "mlp": st.booleans(), "post": LAYERS}
) | st.sampled_from([{}, None, {"attention": 0}])
SETTINGS: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
FAMILIES: dict[str, PreTrainedConfig | None] = {
    "llama": None,
    "gpt2": GPT2Config(vocab_size=160, n_embd=32, n_layer=4, n_head=4, n_positions=128),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "falcon": FalconConfig(vocab_size=160, hidden_size=32, num_hidden_layers=4, num_attention_heads=4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, config in FAMILIES.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        model = tiny_llama(torch.float32) if config is None else AutoModelForCausalLM.from_config(config)
        model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pruned"
    prune(tiny_llama(torch.float32), Mask.of([Block.parse("mha.1"), Block.parse("mlp.2")])).save_pretrained(folder)
    return folder


def taken_or_refused(folder: Path) -> bool:
    """Whether a folder is taken as a search takes it: from its files, without weights, with weights, and by the check.
    Raises whatever is no refusal in one line."""
    try:
        source = materialize(ModelSource(str(folder)), "float32")
        model = meta_model(source, "float32")
        is_pruned = model.config.model_type.startswith(PRUNED_PREFIX)
        num_layers = 1 if is_pruned else Decoder(model).shape.num_layers
        model = load_model(source, "float32")
        if not is_pruned:
            check_removable(Decoder(model))
    except UserError as error:
        is_one_line = "\n" not in str(error) and len(str(error)) < 900
        if not is_one_line:
            raise AssertionError("expected one line") from error
        return False
    assert num_layers >= 1
    assert model(input_ids=torch.arange(3, 9)[None]).logits.shape == (1, 6, model.config.vocab_size)
    return True


@settings(max_examples=35, **SETTINGS)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2),
    dropped=st.sets(st.sampled_from(KEYS), max_size=1),
)
def test_a_config_with_any_value_is_taken_or_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, family: str, changes: dict[str, Any], dropped: set[str]
) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[family], folder)
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if key not in dropped}
    (folder / "config.json").write_text(json.dumps(values))
    taken_or_refused(folder)


@settings(max_examples=30, **SETTINGS)
@given(start=st.integers(0, 900), cut=st.integers(0, 30), put=st.binary(max_size=6))
def test_a_config_with_any_bytes_is_taken_or_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, start: int, cut: int, put: bytes
) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders["llama"], folder)
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(content[:start] + put + content[start + cut :])
    taken_or_refused(folder)


@settings(max_examples=30, **SETTINGS)
@given(key=st.sampled_from([*PRUNED_KEYS, *KEYS]), value=VALUES | st.lists(GROUPS, max_size=4))
def test_the_config_of_a_pruned_model_with_any_value_is_taken_or_refused_in_one_line(
    pruned: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pruned, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, key: value}))
    taken_or_refused(folder)
