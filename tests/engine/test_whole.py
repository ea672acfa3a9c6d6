"""A multimodal model without blocks of its text decoder answers about an image as one whose blocks give nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import load_whole, text_of
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.model.whole import WITH_IMAGES, check_whole, prune_whole
from blockpruner.engine.sections import ModelSource
from tests.engine.multimodals import E2B, RIGHT, image_inputs, image_token, without, write_multimodal

OFTEN = ("gemma3", "gemma4", "llava", "qwen3_vl")
MASKS = ("mha.0+mha.1+mlp.1", "mha.1+mlp.0", "mha.0+mlp.0+mha.2+mlp.2", "mlp.0+mlp.1+mlp.2+mlp.3", "mha.1+mha.2+mha.3")
"""Also with attentions gone where Qwen3-VL adds features of the image to the stream."""
ROUNDING = 2e-5
"""Of logits in float32, in standard deviations: mapped weights may lie where another kernel must be used."""


@torch.inference_mode()
def logits(model: PreTrainedModel, given: dict[str, Any]) -> torch.Tensor:
    return model(**given).logits


def generate(model: PreTrainedModel, given: dict[str, Any], *, use_cache: bool = True) -> list[list[int]]:
    tokens: torch.Tensor = model.generate(
        **given, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0,
        suppress_tokens=[image_token(model)],
    )  # fmt: skip
    return tokens.tolist()


def is_right(model_type: str, folder: Path, masks: Sequence[str] = MASKS, **changes: Any) -> None:
    source = ModelSource(str(write_multimodal(folder / "dense", model_type, **changes)))
    dense = load_whole(source, "float32").eval()
    text, given = text_of(dense, source), image_inputs(dense)
    for number, mask in enumerate(map(Mask.parse, masks)):
        written = folder / str(number)
        prune_whole(dense, text, prune(text, mask)).save_pretrained(written)
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            written, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        whole, spread = logits(dense, given), logits(dense, given).std()
        another = logits(dense, {**given, "pixel_values": -given["pixel_values"]})
        assert (another - whole).abs().max() > 0.1 * spread  # what is in the image matters
        with without(dense, mask):
            expected, tokens = logits(dense, given), generate(dense, given)
        assert (expected - whole).abs().max() > 0.1 * spread  # so do the blocks
        assert (logits(loaded.eval(), given) - expected).abs().max() <= ROUNDING * spread
        assert generate(loaded, given) == generate(loaded, given, use_cache=False) == tokens


@pytest.mark.parametrize("model_type", OFTEN)
def test_a_pruned_multimodal_model_answers_about_an_image_as_the_masked_one(model_type: str, tmp_path: Path) -> None:
    is_right(model_type, tmp_path, MASKS[:2])


def test_gemma4_e2b_gives_every_layer_left_its_own_inputs_and_the_keys_that_it_shares(tmp_path: Path) -> None:
    is_right("gemma4", tmp_path, ("mha.2+mlp.0", "layer.3+mlp.1+mha.2"), text_config=E2B)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(WITH_IMAGES))
def test_every_type_that_is_written_as_a_whole_is_right(model_type: str, tmp_path: Path) -> None:
    is_right(model_type, tmp_path)


def test_features_of_an_image_go_to_the_layers_that_the_tests_remove(tmp_path: Path) -> None:
    dense = load_whole(ModelSource(str(write_multimodal(tmp_path / "dense", "qwen3_vl"))), "float32")
    given = image_inputs(dense)
    features = dense.get_image_features(given["pixel_values"], given["image_grid_thw"]).deepstack_features
    assert len(features) == 3


def test_a_type_that_was_not_tried_with_an_image_is_not_written_as_a_whole() -> None:
    assert set(WITH_IMAGES) < set(RIGHT)
    with pytest.raises(UserError, match=r"'voxtral' cannot be written as a whole without blocks.*use `text_only`"):
        check_whole("voxtral")


def test_the_manual_lists_the_types_that_are_written_as_a_whole() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    listed = manual.partition("tests/engine/test_whole.py`): ")[2].partition(".")[0]
    assert set(re.split(r",\s", listed)) == WITH_IMAGES
