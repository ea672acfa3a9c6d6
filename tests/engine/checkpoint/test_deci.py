"""The DeciLM layout: equal to the pruned model, and as the engines that read it expect it."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.deci import deci_model, why_not_deci
from blockpruner.engine.checkpoint.remainder import what_is_left
from blockpruner.engine.model.classes.decilm.configuration_decilm import DeciLMConfig
from blockpruner.engine.model.surgery import prune
from tests.conftest import generate, load, random_windows, tiny_llama
from tests.engine.architectures import ROWS, Row

MASKS = ["mha.0", "mlp.0", "mha.0+mlp.0", "mha.0+mha.1+mlp.2", "mha.1+mlp.1+mha.3", "mlp.0+mlp.1+mlp.2+mlp.3"]
LIKE_LLAMA = {
    "llama": ROWS["llama"],
    "llama tied": ROWS["llama tied"],
    "llama with biases in its attention": Row("LlamaConfig", {"attention_bias": True}),
    "qwen2": ROWS["qwen2"],
    "mistral": Row("MistralConfig", {"sliding_window": None, "head_dim": 16}),
}


def dense(name: str) -> PreTrainedModel:
    return LIKE_LLAMA[name].model().float()


def save(model: PreTrainedModel, text: str, folder: Path) -> PreTrainedModel:
    pruned = prune(model, Mask.parse(text))
    written, _ = deci_model(what_is_left(pruned))
    written.generation_config = pruned.generation_config
    written.save_pretrained(folder)
    return pruned


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("llama", "mistral") else ()) for name in LIKE_LLAMA]
)
def test_the_saved_model_gives_the_pruned_ones_logits_and_tokens_with_every_cache(
    name: str, text: str, tmp_path: Path
) -> None:
    pruned = save(dense(name), text, tmp_path)
    loaded = load(tmp_path, "float32")
    ids = random_windows() % 120
    with torch.inference_mode():
        torch.testing.assert_close(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)
    plain = generate(pruned, use_cache=False)
    assert generate(loaded) == plain
    assert generate(loaded, cache_implementation="static") == plain
    assert generate(loaded, num_beams=3) == generate(pruned, num_beams=3, use_cache=False)


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    save(dense("qwen2"), "mha.0+mlp.1+mha.2", tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert {"configuration_decilm.py", "modeling_decilm.py"} < set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_layer_that_lost_both_blocks_is_gone_and_halves_of_two_layers_become_one() -> None:
    left = what_is_left(prune(dense("llama"), Mask.parse("mlp.0+mha.1+mha.3+mlp.3")))
    assert [(layer.attention, layer.mlp) for layer in left.layers()] == [(0, 1), (2, 2)]
    assert [(layer.attention, layer.mlp) for layer in left.layers(sequential=False)] == [(0, None), (None, 1), (2, 2)]


def test_the_config_is_as_engines_read_it(tmp_path: Path) -> None:
    save(dense("qwen2"), "mha.0+mlp.1+mha.2+mlp.2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas"
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 3
    assert (config["qkv_bias"], config["attention_bias"]) == (True, False)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    # vLLM cannot begin with a layer without attention.
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, False, False]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, True, False]
    for block in config["block_configs"]:
        assert block["attention"]["n_heads_in_group"] == 2
        assert block["ffn"]["no_op"] == (block["ffn"]["ffn_mult"] is None)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert not file.get_tensor("model.layers.0.self_attn.o_proj.weight").any()
    assert not any(name.startswith("model.layers.1.mlp") for name in names)


@pytest.mark.parametrize("width", [48, 256, 11008, 18944])
def test_every_engine_computes_the_width_that_is_stored(width: int) -> None:
    """int(2 x ffn_mult x hidden / 3), rounded up to a multiple of 256."""
    model = tiny_llama(torch.float32, intermediate_size=width, num_hidden_layers=2)
    written, _ = deci_model(what_is_left(prune(model, Mask.parse("mha.1"))))
    mult = written.config.block_configs[0].ffn.ffn_mult
    computed = int(2 * mult * 32 / 3)
    assert written.model.layers[0].mlp.gate_proj.weight.shape[0] == -(-computed // 256) * 256 >= width


def test_block_configs_are_dicts_and_attributes_and_can_be_pickled() -> None:
    config = DeciLMConfig(block_configs=[{"attention": {"no_op": True}, "ffn": {"no_op": False, "ffn_mult": 2.0}}])
    for one in (config, pickle.loads(pickle.dumps(config))):
        block = one.block_configs[0]
        assert block.attention.no_op is block["attention"]["no_op"] is True
        assert not hasattr(block.attention, "ffn_mult")
    config.num_key_value_heads = [1, 2]  # TensorRT-LLM assigns a list


REFUSED: dict[str, str] = {
    "mistral sliding": "sliding-window",
    "qwen2 sliding": "sliding-window",
    "llama biased": "MLPs with biases",
    "qwen3": "not for 'qwen3'",
    "cohere": "not for 'cohere'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_layout_cannot_express_is_refused(name: str) -> None:
    reason = why_not_deci(what_is_left(prune(ROWS[name].model(), Mask.parse("mha.1"))))
    assert reason is not None
    assert REFUSED[name] in reason


def test_importing_the_package_makes_trust_unnecessary(tmp_path: Path) -> None:
    save(dense("llama"), "mha.0", tmp_path / "deci")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "deci")).__module__.startswith(
        "blockpruner.engine.model.classes"
    )
    for name in ("stablelm", "stablelm parallel"):  # one type, two forms
        pruned: Any = prune(ROWS[name].model(), Mask.parse("mha.0+mlp.2"))
        pruned.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        ids = random_windows() % 120
        assert torch.equal(again(input_ids=ids).logits, pruned(input_ids=ids).logits)
    assert AutoConfig.from_pretrained(tmp_path / "stablelm").model_type == "blockpruned_stablelm"
