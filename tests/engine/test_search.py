"""The greedy strategy on made-up scores, and against the official loop on a real tiny model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import Block, Granularity, Kind, Mask
from engine.decoder import Decoder
from engine.errors import SearchFailed, UserError
from engine.forked import CallShape, ForkedPass
from engine.reference import plain_search
from engine.search.budget import Budget
from engine.search.greedy import Greedy
from engine.shape import BlockShape, ModelShape
from tests.conftest import random_windows, tiny_llama

SHAPE = ModelShape(
    hidden_size=8,
    vocab_size=50,
    attention_width=8,
    num_parameters=1000,
    mha=(BlockShape(100, 96),) * 3,
    mlp=(BlockShape(200, 192),) * 3,
    shared=(0,) * 3,
)


def greedy(num_remove: int | None = None, ratio: float | None = None, blocks: Granularity = Granularity.MIX) -> Greedy:
    return Greedy(blocks, Budget(num_remove=num_remove, ratio=ratio), SHAPE)


def run(strategy: Greedy, nll_of: dict[str, float]) -> list[str]:
    while candidates := strategy.ask():
        strategy.tell(candidates, [nll_of[str(candidate.block)] for candidate in candidates])
    return [str(block) for block in strategy.removed]


SCORES = {"mha.0": 3.0, "mha.1": 1.0, "mha.2": 2.0, "mlp.0": 2.5, "mlp.1": 1.5, "mlp.2": 9.0}


def test_the_lowest_perplexity_goes_first() -> None:
    assert run(greedy(4), SCORES) == ["mha.1", "mlp.1", "mha.2", "mlp.0"]


def test_a_ratio_stops_the_search_once_it_is_reached() -> None:
    assert run(greedy(ratio=0.3), SCORES) == ["mha.1", "mlp.1"]
    assert run(greedy(ratio=0.31), SCORES) == ["mha.1", "mlp.1", "mha.2"]


def test_ties_go_to_the_earlier_candidate_and_attention_comes_before_mlp() -> None:
    assert run(greedy(3), dict.fromkeys(SCORES, 1.0)) == ["mha.0", "mha.1", "mlp.0"]


def test_a_candidate_without_a_finite_score_is_never_chosen() -> None:
    assert run(greedy(1), SCORES | {"mha.1": math.nan, "mlp.1": math.inf}) == ["mha.2"]


def test_a_step_in_which_every_candidate_fails_ends_the_search() -> None:
    strategy = greedy(1)
    candidates = strategy.ask()
    with pytest.raises(SearchFailed, match="all 6 candidates"):
        strategy.tell(candidates, [math.nan] * len(candidates))


@given(st.permutations(sorted(SCORES)))
def test_one_attention_always_survives(order: list[str]) -> None:
    nll_of = {block: float(index) for index, block in enumerate(order)}
    removed = run(greedy(5), nll_of)
    assert len(removed) == 5
    assert sum(block.startswith("mha") for block in removed) <= 2


@pytest.mark.parametrize(
    ("blocks", "first", "num_candidates"),
    [(Granularity.MHA, "mha.1", 3), (Granularity.MLP, "mlp.1", 3), (Granularity.LAYER, "layer.1", 3)],
)
def test_the_granularity_decides_what_may_go(blocks: Granularity, first: str, num_candidates: int) -> None:
    strategy = greedy(1, blocks=blocks)
    assert len(strategy.ask()) == num_candidates
    scores = SCORES | {"layer.0": 3.0, "layer.1": 1.0, "layer.2": 2.0}
    assert run(strategy, scores) == [first]


@pytest.mark.parametrize(
    ("num_remove", "ratio", "blocks", "message"),
    [
        (0, None, Granularity.MIX, "at least 1"),
        (6, None, Granularity.MIX, "from 1 to 5"),
        (3, None, Granularity.LAYER, "from 1 to 2"),
        (None, 0.0, Granularity.MIX, "between 0 and 1"),
        (None, 1.0, Granularity.MIX, "between 0 and 1"),
        (None, 0.5, Granularity.MHA, "at most 0.2"),
        (None, 0.9, Granularity.MIX, "at most 0.8"),
        (None, None, Granularity.MIX, "either"),
        (1, 0.5, Granularity.MIX, "either"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    num_remove: int | None, ratio: float | None, blocks: Granularity, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        greedy(num_remove, ratio, blocks)


@pytest.mark.parametrize("blocks", [Granularity.MIX, Granularity.LAYER])
def test_forked_greedy_finds_the_order_and_the_scores_of_the_official_loop(blocks: Granularity) -> None:
    model, windows = tiny_llama(), random_windows()
    decoder = Decoder(model)
    forked = ForkedPass(decoder, CallShape(sequences_per_call=4, tokens_per_head_call=64))
    num_remove = 3
    strategy = Greedy(blocks, Budget(num_remove=num_remove), decoder.shape)
    found = []
    while candidates := strategy.ask():
        sums = forked.window_sums([candidate.mask for candidate in candidates], windows)
        nlls = (sums.mean(dim=1) / (windows.shape[1] - 1)).tolist()
        best = strategy.tell(candidates, nlls)
        found.append((candidates[best].block, nlls[best]))
    official = plain_search(model, windows, num_remove, blocks)
    assert [block for block, _ in found] == [block for block, _ in official]
    assert [nll for _, nll in found] == pytest.approx([score.nll for _, score in official], rel=1e-13)


def test_a_recorded_step_can_be_replayed() -> None:
    strategy = greedy(2)
    strategy.accept(Block(Kind.MLP, 1))
    assert strategy.mask == Mask.parse("mlp.1")
    assert run(strategy, SCORES) == ["mlp.1", "mha.1"]
