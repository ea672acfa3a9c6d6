"""Layers that do something to their stream beside their blocks, as those of Gemma 4, which scale it: that stays, even
of layers of which both blocks are gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.checkpoint.remainder import what_is_left
from blockpruner.engine.compensation.stages import Stages
from blockpruner.engine.compensation.surgery import mask_of
from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import bypassed, check_removable
from blockpruner.engine.model.surgery import check_cache, keep_layers, prune
from blockpruner.engine.scoring.forked import ForkedPass
from blockpruner.engine.scoring.reference import plain_score, plain_window_sum
from tests.conftest import generate, load
from tests.engine.architectures import ROWS, Row
from tests.engine.test_architectures import CALL_SHAPE, windows

BLOCKS = Granularity.MIX.candidates(4)
LAST = 3


def gemma4() -> PreTrainedModel:
    """The scales of a real one are between 0.005 and 0.92; transformers makes them 1."""
    model = ROWS["gemma4"].model()
    for number, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.9 - 0.2 * number)
    return model


def doge() -> PreTrainedModel:
    """Weighs each channel of its residual stream."""
    model = Row("DogeConfig", {"head_dim": 8}).model()
    for name, weight in model.named_parameters():
        if "residual" in name:
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


MODELS = {"gemma4": gemma4, "doge": doge}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@torch.inference_mode()
def hooked_sums(model: PreTrainedModel, mask: Mask) -> list[float]:
    """Losses of the dense model's own forward, in which hooks take the outputs of blocks away."""
    with bypassed(Decoder(model), mask.absent):
        return [plain_window_sum(model, window) for window in windows()]


GONE = [
    "layer.0",
    "layer.1",
    "layer.3",
    "layer.0+layer.1+mha.2",
    "layer.2+layer.3",
    "mha.0+layer.1+mlp.2",
    "mlp.0+layer.2",
]


def test_a_forked_score_is_that_of_the_model_with_hooks_and_of_the_pruned_one(model: PreTrainedModel) -> None:
    decoder = Decoder(model)
    check_removable(decoder)
    masks = [Mask(), *(Mask().without(block) for block in BLOCKS), *map(Mask.parse, GONE)]
    sums = ForkedPass(decoder, CALL_SHAPE).window_sums(masks, windows()).tolist()
    for mask, found in zip(masks, sums, strict=True):
        assert found == pytest.approx(hooked_sums(model, mask), rel=1e-6), mask
        assert found == pytest.approx(plain_score(model, mask, windows()).window_sums, rel=1e-6), mask


@given(st.lists(st.lists(st.sampled_from(BLOCKS[1:]), unique=True), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_any_set_of_masks_scores_as_with_hooks(blocks: list[list[object]]) -> None:
    model, masks = gemma4(), [Mask.of(some) for some in blocks]  # type: ignore[arg-type]
    sums = ForkedPass(Decoder(model), CALL_SHAPE).window_sums(masks, windows()).tolist()
    for mask, found in zip(masks, sums, strict=True):
        assert found == pytest.approx(hooked_sums(model, mask), rel=1e-9), mask


@pytest.mark.parametrize("text", GONE)
def test_a_checkpoint_keeps_what_layers_do_beside_their_blocks(
    model: PreTrainedModel, tmp_path: Path, text: str
) -> None:
    model, mask = model.float(), Mask.parse(text)
    pruned = prune(model, mask)
    assert mask_of(pruned, Decoder(model).shape) == mask
    check_cache(pruned)
    write_grouped(pruned, None, {"format": "grouped"}, tmp_path / "pruned")
    loaded = load(tmp_path / "pruned", "float32")
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=windows()).logits, pruned(input_ids=windows()).logits)
    assert generate(loaded) == generate(pruned, use_cache=False)
    left = sum(weight.numel() for weight in pruned.parameters())
    shape = Decoder(model).shape
    assert left == shape.num_parameters - shape.num_removed(mask)


def test_layers_whose_blocks_are_gone_are_empty_only_where_something_is_left_of_them() -> None:
    def empty(model: PreTrainedModel) -> list[object]:
        return [group.get("empty") for group in prune(model, Mask.parse("layer.0+layer.2+mha.3")).config.block_groups]

    assert empty(gemma4()) == [[0, 2]]
    assert empty(ROWS["gemma3 text" if "gemma3 text" in ROWS else "llama"].model()) == [None]


def test_what_would_lose_it_is_refused() -> None:
    model = gemma4()
    with pytest.raises(UserError, match="layers are nothing but their blocks, got one of type 'gemma4_text'"):
        keep_layers(model, [0, 2])
    with pytest.raises(UserError, match="layers of which both blocks are gone; use `format=grouped`"):
        what_is_left(prune(model, Mask.parse("layer.1")))
    with pytest.raises(UserError, match="'gemma4_text' cannot be compensated: its layers do something to the stream"):
        Stages.of(Decoder(model), Mask.parse("mha.1"))


def test_the_influence_of_layers_behind_an_empty_one_is_measured_on_its_stream() -> None:
    model, mask = gemma4(), Mask.parse("layer.1")
    found = measure_influence(Decoder(model), windows(), mask=mask).block_influence
    streams: list[torch.Tensor] = []
    hook = lambda layer, args, output: streams.extend([args[0].clone(), output.clone()])  # noqa: E731
    handle = model.model.layers[LAST].register_forward_hook(hook)
    with torch.inference_mode(), bypassed(Decoder(model), mask.absent):
        model(input_ids=windows())
    handle.remove()
    before, after = streams
    expected = 1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
    (layer,) = [value for block, value in found.items() if str(block) == f"layer.{LAST}"]
    assert layer == pytest.approx(expected, rel=1e-9)
