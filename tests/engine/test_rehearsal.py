"""A copy of a few layers says what the whole model would: whether it can be searched and pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DogeConfig, LlamaConfig, PreTrainedConfig

from blockpruner.engine.blocks import Kind
from blockpruner.engine.errors import UserError
from blockpruner.engine.model import rehearsal
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.few_layers import with_few_layers
from blockpruner.engine.model.loading import meta_from_config, meta_model
from blockpruner.engine.model.rehearsal import rehearse
from blockpruner.engine.sections import ModelSource
from tests.conftest import TINY
from tests.engine.architectures import COMMON, ROWS
from tests.engine.test_unsupported import CASES
from tests.families.configs import make_config
from tests.remote_code import MODELING, write_remote_code_model

SOURCE = ModelSource("model")
NAMES_OF_DEPTH = ("n_layer", "n_layers", "num_layers")


def deeper(row: str) -> PreTrainedConfig:
    """The row's config with twice the layers, and with a padding token beyond a small vocabulary."""
    options = {**COMMON, **ROWS[row].options, "vocab_size": 400, "pad_token_id": 399, "num_hidden_layers": 8}
    options |= {name: 8 for name in NAMES_OF_DEPTH if name in options}
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"] * 2
    if "attention_types" in options:
        options["attention_types"] = [[["global", "local"], 4]]
    return getattr(transformers, ROWS[row].config)(**options)


def tried(config: PreTrainedConfig, source: ModelSource = SOURCE) -> str:
    return rehearse(meta_from_config(config, "float32", source), source)


@pytest.mark.parametrize("row", ROWS)
def test_a_supported_family_passes_with_fewer_layers_and_tokens(row: str) -> None:
    assert tried(deeper(row)) == ""


@pytest.mark.parametrize(("row", "kinds", "message"), [
    ("llama", (Kind.MHA, Kind.MLP), None), ("gemma3", (Kind.MHA, Kind.MLP), None), ("qwen3_moe", (Kind.MHA,), None),
    ("stablelm", (Kind.MLP,), None), ("stablelm", (Kind.MHA, Kind.MLP), "parts of blocks cannot be removed"),
    ("opt", (Kind.MHA,), "does not give what it gives with zeros"),
])  # fmt: skip
def test_whether_parts_of_blocks_can_be_removed_is_tried(
    row: str, kinds: tuple[Kind, ...], message: str | None
) -> None:
    skeleton = meta_from_config(deeper(row), "float32", SOURCE)
    if message is None:
        assert rehearse(skeleton, SOURCE, kinds) == ""
    else:
        with pytest.raises(UserError, match=message):
            rehearse(skeleton, SOURCE, kinds)


def test_a_copy_without_blocks_of_which_parts_can_be_removed_says_nothing_about_the_model() -> None:
    skeleton = meta_from_config(deeper("mixtral"), "float32", SOURCE)
    assert "have no mlp block of which parts can be removed" in rehearse(skeleton, SOURCE, (Kind.MLP,))


@pytest.mark.parametrize("family", ["gemma3n", "gpt_neox_japanese"])
def test_a_family_that_is_not_supported_is_refused_as_the_whole_model_would_be(family: str) -> None:
    config, message = CASES[family]
    with pytest.raises(UserError) as error:
        tried(config)
    assert message in str(error.value)


def test_a_family_that_could_not_generate_without_blocks_is_refused_too() -> None:
    with pytest.raises(UserError, match="a pruned model of type 'recurrent_gemma' could not generate"):
        tried(make_config("recurrent_gemma"))


def test_weights_that_most_models_are_made_with_do_not_hide_what_trained_ones_show() -> None:
    """Doge scales its residual by weights that begin as ones."""
    model = rehearsal.small_copy(DogeConfig(**TINY), 2, 120, SOURCE)
    assert (model.model.layers[0].input_residual != 1).all()


def test_the_copy_has_a_layer_of_each_kind() -> None:
    config = deeper("gemma3")
    config.layer_types = ["sliding_attention"] * 5 + ["full_attention"] * 3
    small = with_few_layers(config, 2)
    assert (small.num_hidden_layers, small.layer_types) == (2, ["sliding_attention", "full_attention"])
    assert len(config.layer_types) == 8


def test_a_dense_first_layer_does_not_hide_the_routed_ones() -> None:
    config = deeper("qwen3_moe")
    config.mlp_only_layers = [0, 1]
    model = rehearsal.small_copy(config, 4, 256, SOURCE)
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, False, True, True]
    assert tried(config) == ""


def test_experts_and_layers_of_a_copy_differ_though_they_share_memory() -> None:
    model = rehearsal.small_copy(deeper("mixtral"), 2, 256, SOURCE)
    first, second = (layer.mlp.experts.gate_up_proj for layer in model.model.layers)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_tied_weights_of_a_copy_are_tied() -> None:
    model = rehearsal.small_copy(deeper("llama tied"), 2, 256, SOURCE)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_copy_beyond_the_largest_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LARGEST_BYTES", 2**10)
    assert tried(LlamaConfig(**TINY)).startswith("MemoryError: a copy needs ")


@pytest.mark.parametrize(
    ("needs", "told"),
    [("config.num_hidden_layers == 4", "ValueError: this model is as it is"), ("config.vocab_size == 300", "")],
)
def test_a_copy_that_cannot_be_made_refuses_nothing(needs: str, told: str, tmp_path: Path) -> None:
    """A model that needs all of its layers is not tried; one that needs its vocabulary gets it."""
    folder = tmp_path / ("a" if told else "b")  # code is kept by the name of its folder
    write_remote_code_model(folder)
    made = "class TinychuanModel(TinychuanPreTrainedModel):\n    def __init__(self, config):\n"
    refuses = f'        if not {needs}:\n            raise ValueError("this model is as it is")\n'
    (folder / "modeling_tinychuan.py").write_text(MODELING.replace(made, made + refuses))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 160', '"vocab_size": 300'))
    source = ModelSource(str(folder), trust_remote_code=True)
    assert rehearse(meta_model(source, "float32"), source) == told


def test_a_refusal_of_a_copy_is_that_of_the_whole_model() -> None:
    torch.manual_seed(0)
    config, _ = CASES["gpt_neox_japanese"]
    with pytest.raises(UserError) as of_whole:
        check_removable(Decoder(AutoModelForCausalLM.from_config(config)))
    with pytest.raises(UserError) as of_copy:
        tried(config)
    assert str(of_copy.value) == str(of_whole.value)
