"""Layers that are given more than their stream: per-layer inputs of the tokens, and keys and values that earlier layers
left, as in Gemma 4 E2B and E4B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.checkpoint.remainder import what_is_left
from blockpruner.engine.compensation.stages import Stages
from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.model import given as given_module
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import bypassed, check_removable
from blockpruner.engine.model.few_layers import with_few_layers
from blockpruner.engine.model.holding import load_decoder
from blockpruner.engine.model.rehearsal import rehearse
from blockpruner.engine.model.rows import ARCHITECTURES, Architecture
from blockpruner.engine.model.surgery import check_cache, prune
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.reference import plain_window_sum
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement
from blockpruner.engine.work.units import kernel_shape
from tests.conftest import generate, load
from tests.engine.architectures import Row
from tests.engine.test_architectures import CALL_SHAPE, windows

TYPES = ["sliding_attention", "full_attention"]
E2B = Row(
    "Gemma4TextConfig",
    {
        "num_hidden_layers": 7, "num_kv_shared_layers": 3, "layer_types": [*TYPES * 2, *TYPES[:1], *TYPES],
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 120, "use_double_wide_mlp": True,
        "head_dim": 8, "global_head_dim": 16, "sliding_window": 6,
    },
)  # fmt: skip
"""Layers 2 and 3 leave their keys and values, and layers 4 to 6 read them."""
NEEDED = {Block(Kind.MHA, 2), Block(Kind.MHA, 3)}
MASKS = [
    "layer.0+layer.5",
    "mha.4+mha.5+mha.6",
    "mha.0+mlp.2+mlp.3+mha.5",
    "layer.4+layer.5+layer.6+layer.0+layer.1",
    "mlp.2+mha.6",
    "mlp.3+mha.4+mlp.4",
]


def e2b() -> PreTrainedModel:
    model = E2B.model()
    for number, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.9 - 0.1 * number)
    return model


CANDIDATES = [block for block in Granularity.MIX.candidates(7) if block not in NEEDED]


@torch.inference_mode()
def hooked_sums(model: PreTrainedModel, mask: Mask) -> list[float]:
    """Losses of the dense model's own forward, in which hooks take the outputs of blocks away."""
    with bypassed(Decoder(model), mask.absent):
        return [plain_window_sum(model, window) for window in windows()]


def test_any_row_of_a_sweep_has_the_keys_and_values_that_its_own_layers_left() -> None:
    model = e2b()
    decoder = Decoder(model)
    check_removable(decoder)
    masks = [Mask(), *(Mask().without(block) for block in CANDIDATES), *map(Mask.parse, MASKS)]
    for call_shape in (CALL_SHAPE, CallShape(sequences_per_call=5, tokens_per_head_call=7)):
        sums = ForkedPass(decoder, call_shape).window_sums(masks, windows()).tolist()
        assert len({tuple(found) for found in sums}) == len(masks)
        for mask, found in zip(masks, sums, strict=True):
            assert found == pytest.approx(hooked_sums(model, mask), rel=1e-12), mask


def test_keys_and_values_of_another_row_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = e2b(), [Mask(), Mask.parse("mlp.1")]
    right = given_module.Beside.of
    monkeypatch.setattr(given_module.Beside, "of", lambda self, layer, slots: right(self, layer, [0] * len(slots)))
    sums = ForkedPass(Decoder(model), CALL_SHAPE).window_sums(masks, windows()).tolist()
    assert sums[1] != pytest.approx(hooked_sums(model, masks[1]), rel=1e-4)


@given(st.lists(st.lists(st.sampled_from(CANDIDATES), unique=True), min_size=1, max_size=5))
@settings(max_examples=10, deadline=None)
def test_any_set_of_masks_scores_as_with_hooks(blocks: list[list[Block]]) -> None:
    model, masks = e2b(), [Mask.of(some) for some in blocks]
    sums = ForkedPass(Decoder(model), CALL_SHAPE).window_sums(masks, windows()).tolist()
    for mask, found in zip(masks, sums, strict=True):
        assert found == pytest.approx(hooked_sums(model, mask), rel=1e-12), mask


def test_streamed_layers_give_the_same_bits(tmp_path: Path) -> None:
    e2b().float().save_pretrained(tmp_path / "model")
    masks = [Mask(), *(Mask().without(block) for block in CANDIDATES)]
    resident, streamed = (
        ForkedPass(
            load_decoder(ModelSource(str(tmp_path / "model")), "float32", placement, [torch.device("cpu")]), CALL_SHAPE
        )
        for placement in (Placement.RESIDENT, Placement.STREAMED)
    )
    assert torch.equal(resident.window_sums(masks, windows()), streamed.window_sums(masks, windows()))


def test_a_mixer_that_later_ones_read_from_is_no_candidate_and_cannot_be_removed() -> None:
    model = e2b()
    shape = Decoder(model).shape
    assert shape.needed == NEEDED
    assert (shape.num_blocks, shape.candidates(Granularity.MIX)) == (14, CANDIDATES)
    assert [block.layer for block in shape.candidates(Granularity.LAYER)] == [0, 1, 4, 5, 6]
    assert "mha.2, mha.3 stay, because mixers of later layers read" in shape.note
    space = SearchSpace(shape=shape, blocks=Granularity.MHA, budget=Budget(num_remove=5))
    assert space.allows(Mask.of(shape.candidates(Granularity.MHA)))
    with pytest.raises(UserError, match="from 1 to 5"):
        SearchSpace(shape=shape, blocks=Granularity.MHA, budget=Budget(num_remove=6))
    for text in ("mha.2", "layer.3"):
        with pytest.raises(UserError, match=r"got mha\.\d: mixers of later layers read its keys and values"):
            prune(model, Mask.parse(text))
        with pytest.raises(UserError, match="mixers of later layers read"):
            ForkedPass(Decoder(model), CALL_SHAPE).window_sums([Mask.parse(text)], windows())


def test_without_shared_layers_every_mixer_is_a_candidate() -> None:
    row = Row(E2B.config, {**E2B.options, "num_kv_shared_layers": 0, "use_double_wide_mlp": False})
    model = row.model()
    shape = Decoder(model).shape
    assert (shape.needed, shape.left_width) == (frozenset(), 0)
    check_removable(Decoder(model))
    mask = Mask.parse("mha.2+layer.3")
    (found,) = ForkedPass(Decoder(model), CALL_SHAPE).window_sums([mask], windows()).tolist()
    assert found == pytest.approx(hooked_sums(model, mask), rel=1e-12)
    assert generate(prune(model.float(), mask)) == generate(prune(model, mask), use_cache=False)


@pytest.mark.parametrize("text", MASKS)
def test_a_checkpoint_gives_every_layer_its_own_inputs_and_generates_with_a_cache(tmp_path: Path, text: str) -> None:
    model, mask = e2b().float(), Mask.parse(text)
    pruned = prune(model, mask)
    check_cache(pruned)
    write_grouped(pruned, None, {"format": "grouped"}, tmp_path / "pruned")
    loaded = load(tmp_path / "pruned", "float32")
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=windows()).logits, pruned(input_ids=windows()).logits)
        with bypassed(Decoder(model), mask.absent):
            expected = model(input_ids=windows(), use_cache=False).logits
        assert torch.allclose(loaded(input_ids=windows()).logits, expected, rtol=0, atol=1e-5)
        last = loaded(input_ids=windows(), logits_to_keep=1).logits  # sharing layers then see the last token alone
        assert torch.allclose(last, expected[:, -1:], rtol=0, atol=1e-5)
    assert generate(loaded) == generate(pruned, use_cache=False)
    assert generate(loaded, cache_implementation="static") == generate(loaded)
    shape = Decoder(model).shape
    assert loaded.num_parameters() == shape.num_parameters - shape.num_removed(mask)
    num_left = sum(mask.keeps(Kind.MHA, layer) for layer in (4, 5, 6))
    assert loaded.config.num_kv_shared_layers == num_left
    assert loaded.model.first_kv_shared_layer_idx == loaded.config.num_hidden_layers - num_left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by_token": ()}, "layer 0 is given its argument 1, which depends on the tokens, beside the stream"),
        ({"sharing": None}, "'gemma4_text' is not supported: "),
    ],
)
def test_what_the_row_does_not_say_is_refused(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ARCHITECTURES["gemma4_text"]
    assert isinstance(row, Architecture)
    monkeypatch.setitem(ARCHITECTURES, "gemma4_text", replace(row, **change))
    with pytest.raises(UserError) as error:
        check_removable(Decoder(e2b()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_copy_with_few_layers_has_some_that_share(tmp_path: Path) -> None:
    few = with_few_layers(E2B.make_config(), 4)
    assert few.kv_sharing_modes == ["store", "store", "reuse", "reuse"]
    assert rehearse(e2b(), ModelSource(str(tmp_path))) == ""


def test_what_rows_hold_beside_their_stream_counts_as_memory() -> None:
    shape = Decoder(e2b()).shape
    assert shape.left_width == 2 * 2 * 8 + 2 * 2 * 16  # keys and values of two heads, sliding and full
    assert shape.token_width == 7 * 8
    sizes = {"seq_len": 16, "num_windows": 3, "bytes_per_value": 4, "threads": 1}
    plain = Decoder(Row("Gemma4TextConfig", {**E2B.options, "num_kv_shared_layers": 0}).model()).shape
    held, free = kernel_shape(shape, **sizes).masks, kernel_shape(plain, **sizes).masks
    assert held == pytest.approx(free * 32 / (32 + shape.left_width), rel=1e-3)


def test_the_influence_of_blocks_is_measured_with_the_keys_and_values_of_the_dense_model() -> None:
    model = e2b()
    found = measure_influence(Decoder(model), windows()).block_influence
    streams: list[torch.Tensor] = []
    hook = lambda layer, args, output: streams.extend([args[0].clone(), output.clone()])  # noqa: E731
    handle = model.model.layers[5].register_forward_hook(hook)
    with torch.inference_mode():
        model(input_ids=windows())
    handle.remove()
    before, after = streams
    expected = 1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
    assert found[Block(Kind.LAYER, 5)] == pytest.approx(expected, rel=1e-9)


def test_what_would_lose_what_layers_are_given_is_refused() -> None:
    model = e2b()
    with pytest.raises(UserError, match="whose layers are given values of the tokens, too, or what earlier ones left"):
        Decoder(model).embed(windows())
    with pytest.raises(UserError, match="'gemma4_text' cannot be compensated"):
        Stages.of(Decoder(model), Mask.parse("mha.1"))
    with pytest.raises(UserError, match=r"'gemma4_text', whose layers are given.*use `format=grouped`"):
        what_is_left(prune(model, Mask.parse("mha.1")))
