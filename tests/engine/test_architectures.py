"""Every architecture of the table: scores, checkpoints, generation. And what is refused."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.reference import plain_score
from tests.conftest import generate, load
from tests.engine.architectures import NUM_LAYERS, ROWS

CALL_SHAPE = CallShape(sequences_per_call=5, tokens_per_head_call=7)
MASKS = [
    Mask(),
    *(Mask().without(block) for block in Granularity.MIX.candidates(NUM_LAYERS)),
    Mask.parse("mha.0+mlp.0"),
    Mask.parse("mha.0+mha.1+mlp.2"),
    Mask.parse("mha.1+mlp.1+mha.3+mlp.3"),
    Mask.parse("mlp.0+mlp.1+mlp.2+mlp.3"),
    Mask.parse("mha.0+mha.2+mha.3+mlp.1"),
]


def windows(num_windows: int = 2, seq_len: int = 12) -> torch.Tensor:
    return torch.randint(3, 120, (num_windows, seq_len), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_any_mask_scores_as_the_model_from_which_its_blocks_are_gone(name: str) -> None:
    row = ROWS[name]
    model = row.model()
    decoder = Decoder(model)
    check_removable(decoder)
    sums = ForkedPass(decoder, CALL_SHAPE).window_sums(MASKS, windows())
    for mask, row_sums in zip(MASKS, sums.tolist(), strict=True):
        assert row_sums == pytest.approx(plain_score(model, mask, windows()).window_sums, rel=row.tolerance), mask


def test_all_blocks_matter_in_the_test_models(name: str) -> None:
    """Else the comparison above would show nothing."""
    sums = ForkedPass(Decoder(ROWS[name].model()), CALL_SHAPE).window_sums(MASKS, windows())
    assert len({round(total, 9) for total in sums[:, 0].tolist()}) == len(MASKS)


def test_removed_parameters_are_the_blocks_and_their_norms(name: str) -> None:
    model = ROWS[name].model()
    shape = Decoder(model).shape
    for mask in MASKS:
        pruned = prune(model, mask)
        left = sum(weight.numel() for weight in pruned.parameters())
        assert left == shape.num_parameters - shape.num_removed(mask), mask


@pytest.mark.parametrize("text", ["mha.0+mlp.1+mha.2", "mha.0+mlp.0+mlp.3", "mha.0+mha.1+mha.2"])
def test_a_checkpoint_loads_to_the_same_logits_and_generates_the_same_with_every_cache(
    name: str, text: str, tmp_path: Path
) -> None:
    row = ROWS[name]
    pruned = prune(row.model().float(), Mask.parse(text))
    write_grouped(pruned, None, {"format": "grouped"}, tmp_path)
    loaded = load(tmp_path, "float32")
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=windows()).logits, pruned(input_ids=windows()).logits)
    plain = generate(pruned, use_cache=False)
    assert generate(loaded) == plain
    if row.static_cache:
        assert generate(loaded, cache_implementation="static") == plain


def test_where_a_row_forgoes_the_static_cache_the_dense_model_fails_with_it_too() -> None:
    for row in ROWS.values():
        if not row.static_cache:
            model = row.model()
            plain = generate(model, use_cache=False)
            with suppress(RuntimeError, ValueError, TypeError, AttributeError):  # to raise is no better
                assert generate(model, cache_implementation="static") != plain


def test_per_layer_lists_are_cut_to_the_kept_attentions() -> None:
    pruned = prune(ROWS["gemma3"].model(), Mask.parse("mha.1+mlp.2"))
    assert pruned.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_a_shape_tells_whose_scores_lie_in_memory_and_who_routes_tokens() -> None:
    found = {name: Decoder(ROWS[name].model()).shape for name in ("llama", "bloom", "mixtral")}
    assert {name: shape.num_score_heads > 0 for name, shape in found.items()} == {
        "llama": False, "bloom": True, "mixtral": False,
    }  # fmt: skip
    assert {name: shape.routes_tokens for name, shape in found.items()} == {
        "llama": False, "bloom": False, "mixtral": True,
    }  # fmt: skip
