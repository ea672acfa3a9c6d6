"""The text decoder of a multimodal model, as a model of its own, gives what the whole model gives for a text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model import multimodal, multimodal_check
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.holding import load_decoder
from blockpruner.engine.model.loading import check_tensors, load_config, load_model, materialize, meta_model
from blockpruner.engine.model.multimodal import TextType
from blockpruner.engine.model.rehearsal import rehearse
from blockpruner.engine.model.surgery import check_cache, prune
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement
from tests.engine.multimodals import E2B, RIGHT, tiny_config, tiny_multimodal, without, write_multimodal
from tests.hub import HubCache

WEIGHTS = "model.safetensors"
ROUNDING = 2e-5
"""Of logits in float32, in standard deviations: of the few types that tell torch in other words what tokens see."""
OFTEN = ("gemma3", "llava", "qwen3_vl_moe", "aya_vision", "voxtral")
"""Types that are tried in every run of the tests: by rows, with their own, with another scale, within another model."""
TOKENS = torch.randint(3, 140, (2, 24), generator=torch.Generator().manual_seed(5))
MASK = Mask.parse("mha.0+mlp.1+mha.2+mlp.2")


def whole_model(folder: Path) -> PreTrainedModel:
    return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder: Path) -> PreTrainedModel:
    return load_model(ModelSource(str(folder)), "float32")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_config(ModelSource(str(folder)))
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def is_right(folder: Path, mask: Mask = MASK) -> None:
    source, whole = ModelSource(str(folder)), whole_model(folder)
    skeleton = meta_model(source, "float32")
    check_tensors(skeleton, source)
    assert rehearse(skeleton, source) == ""
    text, dense = load(folder), logits(whole)
    assert (logits(text) - dense).abs().max() <= ROUNDING * dense.std()
    check_removable(Decoder(text))
    pruned = prune(text, mask)
    check_cache(pruned)
    with without(whole, mask):
        masked = logits(whole)
    assert (masked - dense).abs().max() > 0.1 * dense.std()
    assert (logits(pruned) - masked).abs().max() <= ROUNDING * dense.std()


def test_the_text_decoder_of_a_small_gemma4_is_right(tmp_path: Path) -> None:
    is_right(write_multimodal(tmp_path / "model", "gemma4", text_config=E2B), Mask.parse("mha.2+mlp.1+mlp.2"))


@pytest.mark.parametrize("model_type", OFTEN)
def test_a_text_decoder_gives_the_logits_of_the_whole_model_with_and_without_blocks(
    model_type: str, tmp_path: Path
) -> None:
    is_right(write_multimodal(tmp_path / "model", model_type))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in RIGHT if name not in OFTEN])
def test_every_type_that_is_said_to_be_right_is(model_type: str, tmp_path: Path) -> None:
    is_right(write_multimodal(tmp_path / "model", model_type))


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return write_multimodal(tmp_path / "llava", "llava")


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add tensors to the weights, or take them out; "__" stands for a dot."""
    stored = load_file(folder / WEIGHTS) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / WEIGHTS)


def test_it_is_said_that_only_the_text_decoder_is_taken(llava: Path) -> None:
    said: list[str] = []
    materialize(ModelSource(str(llava)), "float32", said.append)
    assert said == [f"note: {str(llava)!r} is a multimodal model of type 'llava'; this is about its text decoder"]


def test_a_text_decoder_shares_the_tensors_of_its_files(llava: Path) -> None:
    text, stored = load(llava), load_file(llava / WEIGHTS)
    of_text = {name for name in stored if "vision_tower" not in name and "projector" not in name}
    assert len(text.state_dict()) == len(of_text) < len(stored)
    values = {tensor.double().sum().item() for name, tensor in stored.items() if name in of_text}
    assert {tensor.double().sum().item() for tensor in text.state_dict().values()} == values


def test_tensors_may_have_the_names_of_older_versions(llava: Path) -> None:
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(llava / WEIGHTS)
    expected = logits(load(llava))
    now = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.", "model.vision_tower.", 1)
        .replace("multi_modal_projector.", "model.multi_modal_projector."): tensor
        for name, tensor in load_file(llava / WEIGHTS).items()
    }
    save_file(now, llava / WEIGHTS)
    assert torch.equal(logits(load(llava)), expected)


@pytest.mark.parametrize(
    "of", ["language_model.model.layers.1.mlp.up_proj.weight", "multi_modal_projector.linear_1.bias"]
)
def test_a_multimodal_folder_that_lacks_a_tensor_is_refused(llava: Path, of: str) -> None:
    rewrite(llava, **{of: None})
    with pytest.raises(UserError, match="1 tensors are missing"):
        load(llava)


def test_a_multimodal_folder_with_a_tensor_too_many_is_refused(llava: Path) -> None:
    rewrite(llava, another__weight=torch.zeros(2, 2))
    with pytest.raises(UserError, match="1 tensors of the file are not used"):
        load(llava)


def test_tensors_that_are_missing_are_seen_before_loading(tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path / "model", "qwen3_vl")
    source = ModelSource(str(folder))
    name = next(name for name in load_file(folder / WEIGHTS) if "visual" in name)
    rewrite(folder, **{name: None})
    with pytest.raises(UserError, match="1 tensors are missing"):
        check_tensors(meta_model(source, "float32"), source)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_tied_as_in_the_whole_model(tmp_path: Path, tied: bool) -> None:
    folder = write_multimodal(tmp_path / "model", "qwen2_5_vl", tie_word_embeddings=tied)
    source = ModelSource(str(folder))
    for text in (load(folder), meta_model(source, "float32")):
        assert text.config.tie_word_embeddings == tied == (text.lm_head.weight is text.model.embed_tokens.weight)
    assert torch.equal(logits(load(folder)), logits(whole_model(folder)))


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path / "model", "qwen2_5_vl", tie_word_embeddings=False)
    edit(folder / "config.json", tie_word_embeddings=True)
    for text in (load(folder), meta_model(ModelSource(str(folder)), "float32")):
        assert not text.config.tie_word_embeddings
        assert text.lm_head.weight is not text.model.embed_tokens.weight


def test_scales_of_the_logits_are_those_of_the_whole_model(tmp_path: Path) -> None:
    cohere = write_multimodal(tmp_path / "cohere", "aya_vision")  # gives what its head gives
    assert json.loads((cohere / "config.json").read_text())["text_config"]["logit_scale"] == 0.25
    assert load_config(ModelSource(str(cohere))).logit_scale == 1.0
    gemma = write_multimodal(tmp_path / "gemma", "paligemma")
    assert load_config(ModelSource(str(gemma))).final_logit_softcapping == 3.0


def test_a_text_decoder_that_gives_other_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_multimodal(tmp_path / "model", "qwen3_vl_moe")
    monkeypatch.setitem(multimodal.TEXT_TYPES, "qwen3_vl_moe_text", TextType("qwen3_moe"))
    monkeypatch.setattr(multimodal_check, "_difference", multimodal_check._difference.__wrapped__)
    said = refusal(folder)
    assert (
        "a multimodal model of type 'qwen3_vl_moe', of which no text decoder can be taken: as a model of type" in said
    )
    assert "'qwen3_moe' it gives other logits than the whole model (difference" in said


def test_a_text_decoder_with_other_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_multimodal(tmp_path / "model", "qwen2_vl")
    monkeypatch.setitem(multimodal.TEXT_TYPES, "qwen2_vl_text", TextType("qwen3"))
    monkeypatch.setattr(multimodal_check, "_difference", multimodal_check._difference.__wrapped__)
    assert "its tensors are not those of a model of type 'qwen3'" in refusal(folder)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("mllama", "transformers has no causal language model for its 'mllama_text_model'"),
        ("instructblip", "its tensors are not those of a model of type 'opt'"),
        ("blip-2", "a small copy fails with TypeError (Blip2ForConditionalGeneration.forward() missing 1 required"),
        ("idefics", "transformers cannot load its text decoder alone"),
    ],
)
def test_a_type_without_a_text_decoder_is_refused_by_name(model_type: str, why: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    assert f"a multimodal model of type {model_type!r}, of which no text decoder can be taken: {why}" in refusal(
        tmp_path
    )


def test_unsound_sizes_of_a_text_decoder_are_refused(llava: Path) -> None:
    values = json.loads((llava / "config.json").read_text())
    edit(llava / "config.json", text_config={**values["text_config"], "num_hidden_layers": -4})
    assert "expected a sound 'num_hidden_layers'" in refusal(llava)


def test_a_quantised_text_decoder_is_refused(llava: Path) -> None:
    values = json.loads((llava / "config.json").read_text())
    edit(llava / "config.json", text_config={**values["text_config"], "quantization_config": {"quant_method": "awq"}})
    assert "quantised by awq" in refusal(llava)


def test_a_hub_id_may_be_a_multimodal_model(hub_cache: HubCache) -> None:
    folder = write_multimodal(hub_cache.snapshot("someone/seeing", "a" * 40), "llava")
    source, said = ModelSource("someone/seeing"), list[str]()
    assert materialize(source, "float32", said.append) == ModelSource("someone/seeing", "a" * 40)
    assert "a multimodal model of type 'llava'" in said[0]
    assert torch.equal(logits(load_model(source, "float32")), logits(load(folder)))


def test_the_manual_lists_the_types_that_are_tested() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    lines = manual.partition("## Multimodal models")[2].partition("These are tested")[0].splitlines()
    listed = {name for line in lines if line.startswith("| ") for name in re.findall(r"\w+", line.split("|")[1])}
    assert set(RIGHT) <= listed
    assert listed - set(RIGHT) == {"multimodal", "type", "of", "sounds"}


def test_a_config_that_fits_no_language_model_is_refused(tmp_path: Path) -> None:
    config = tiny_config("qwen2_vl")
    config.text_config.rope_parameters = None
    with pytest.raises(UserError, match="its config is none of type 'qwen2'") as error:
        multimodal.text_config(config, "model")
    assert "\n" not in str(error.value)


def test_runtimes_are_not_told_of_positions_of_images(tmp_path: Path) -> None:
    tiny_config("qwen2_5_vl").save_pretrained(tmp_path)
    assert "mrope_section" in (tmp_path / "config.json").read_text()
    assert load_config(ModelSource(str(tmp_path))).rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


def test_a_streamed_text_decoder_gives_the_same_logits(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_multimodal("gemma3").bfloat16().save_pretrained(folder)
    source, cpu = ModelSource(str(folder)), [torch.device("cpu")]
    resident, streamed = (
        load_decoder(source, "float32", placement, cpu).model for placement in (Placement.RESIDENT, Placement.STREAMED)
    )
    assert torch.equal(logits(resident), logits(streamed))
