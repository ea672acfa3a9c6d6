"""Decoders whose token mixers are not all attention, and whose layers may have only one block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask, Mixers
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.surgery import check_cache, prune
from blockpruner.engine.scoring.forked import ForkedPass
from blockpruner.engine.scoring.probe import ALIGNED, is_batch_invariant
from blockpruner.engine.scoring.reference import plain_score
from blockpruner.engine.scoring.scorer import LocalScorer
from blockpruner.engine.scoring.scoring import ScoringReplica
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.units import kernel_shape
from tests.conftest import generate, load
from tests.engine.architectures import HYBRIDS
from tests.engine.test_architectures import CALL_SHAPE, windows

KINDS = {
    "qwen3_next": ["linear attention", "attention"] * 2,
    "qwen3_5": ["linear attention", "attention"] * 2,
    "lfm2": ["convolution", "attention"] * 2,
    "granitemoehybrid": ["mamba", "attention"] * 2,
    "jamba": ["mamba", "attention"] * 2,
    "falcon_h1": ["attention and mamba"] * 4,
    "nemotron_h": ["mamba", "", "attention", "attention"],
    "mamba2": ["mamba"] * 4,
}
COMBINED = ["mha.0+mlp.0", "mha.0+mlp.1+mha.3", "mha.2+mlp.3", "mlp.0+mlp.1+mlp.2+mlp.3"]


@pytest.fixture(params=HYBRIDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def existing(text: str, decoder: Decoder) -> Mask:
    """The mask without the blocks that the model does not have."""
    return Mask(Mask.parse(text).absent - decoder.shape.missing)


def test_any_mask_scores_as_the_model_from_which_its_blocks_are_gone(name: str) -> None:
    row = HYBRIDS[name]
    model = row.model()
    decoder = Decoder(model)
    check_removable(decoder)
    singles = [Mask().without(block) for block in decoder.shape.candidates(Granularity.MIX)]
    masks = list(dict.fromkeys([Mask(), *singles, *(existing(text, decoder) for text in COMBINED)]))
    sums = ForkedPass(decoder, CALL_SHAPE).window_sums(masks, windows())
    for mask, row_sums in zip(masks, sums.tolist(), strict=True):
        assert row_sums == pytest.approx(plain_score(model, mask, windows()).window_sums, rel=row.tolerance), mask
    assert len({round(total, 4) for total in sums[:, 0].tolist()}) == len(masks)


def test_a_checkpoint_loads_to_the_same_logits_and_generates_the_same_with_a_cache(name: str, tmp_path: Path) -> None:
    model = HYBRIDS[name].model().float()
    for number, text in enumerate(("mha.0+mlp.1+mha.3", "mha.2+mlp.3")):
        pruned = prune(model, existing(text, Decoder(model)))
        check_cache(pruned)
        write_grouped(pruned, None, {"format": "grouped"}, tmp_path / str(number))
        loaded = load(tmp_path / str(number), "float32")
        with torch.inference_mode():
            assert torch.equal(loaded(input_ids=windows()).logits, pruned(input_ids=windows()).logits)
        assert generate(loaded) == generate(pruned, use_cache=False)


def test_a_shape_says_what_mixes_the_tokens_of_each_layer(name: str) -> None:
    shape = Decoder(HYBRIDS[name].model()).shape
    assert [shape.mixer(layer) for layer in range(4)] == KINDS[name]


@pytest.mark.parametrize("which", ["mamba2", "qwen3_5", "falcon_h1", "jamba"])
def test_mixers_with_a_state_never_promise_the_same_bits_in_any_company(which: str) -> None:
    decoder = Decoder(HYBRIDS[which].model())
    texts = windows().repeat(1, 2)[:, :ALIGNED]
    scorer = LocalScorer(ScoringReplica(decoder, texts))
    sizes = {"seq_len": ALIGNED, "num_windows": len(texts)}
    kernel = kernel_shape(decoder.shape, **sizes, bytes_per_value=4, threads=1)
    assert decoder.shape.has_recurrence
    assert is_batch_invariant(scorer, decoder.shape, kernel, **sizes) is False


def test_a_convolution_has_no_state_that_depends_on_the_number_of_sequences() -> None:
    assert not Decoder(HYBRIDS["lfm2"].model()).shape.has_recurrence


def test_blocks_that_a_layer_does_not_have_are_no_candidates_and_cannot_be_removed() -> None:
    model = HYBRIDS["nemotron_h"].model()
    shape = Decoder(model).shape
    assert [str(block) for block in shape.candidates(Granularity.MIX)] == ["mha.0", "mha.2", "mha.3", "mlp.1"]
    with pytest.raises(UserError, match=r"got mlp\.0: layer 0 has no MLP"):
        prune(model, Mask.parse("mlp.0"))
    assert prune(model, Mask.parse("layer.0+layer.1")).config.num_hidden_layers == 2


def test_removed_parameters_are_the_blocks_of_a_layer_with_one_block_alone() -> None:
    model = HYBRIDS["nemotron_h"].model()
    shape = Decoder(model).shape
    mask = Mask.parse("mha.0+mlp.1")
    left = sum(weight.numel() for weight in prune(model, mask).parameters())
    assert left == shape.num_parameters - shape.num_removed(mask)


def test_one_mixer_with_positions_stays() -> None:
    model = HYBRIDS["lfm2"].model()
    space = SearchSpace(shape=Decoder(model).shape, blocks=Granularity.MHA, budget=Budget(num_remove=3))
    gone = Mask.parse("mha.1")
    assert Block(Kind.MHA, 3) not in [candidate.block for candidate in space.neighbours(gone)]
    with pytest.raises(UserError, match=r"keeps at least one of mha\.1, mha\.3"):
        prune(model, Mask.parse("mha.1+mha.3"))


def test_a_search_may_leave_mixers_without_a_kv_cache_alone() -> None:
    shape = Decoder(HYBRIDS["lfm2"].model()).shape
    space = SearchSpace(shape=shape, blocks=Granularity.MIX, budget=Budget(num_remove=1), mixers=Mixers.ATTENTION)
    blocks = [str(candidate.block) for candidate in space.candidates(Mask())]
    assert blocks == ["mha.1", "mha.3", "mlp.0", "mlp.1", "mlp.2", "mlp.3"]
