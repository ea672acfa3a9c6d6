"""Strategies on made-up losses, and greedy against the official loop on a real tiny model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.score import Score
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.reference import plain_search
from blockpruner.engine.search.audit import audit, audited_steps, most_misses
from blockpruner.engine.search.budget import Budget, Per
from blockpruner.engine.search.drift import Drift
from blockpruner.engine.search.oracle import Found, Round, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.strategies.evolution import Evolution
from blockpruner.engine.strategies.greedy import Greedy
from blockpruner.engine.strategies.lazy import Lazy
from blockpruner.engine.strategies.one_shot import OneShot
from blockpruner.engine.work.shape import BlockShape, ModelShape
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


def shape_of(num_layers: int) -> ModelShape:
    return ModelShape(
        hidden_size=8,
        vocab_size=50,
        attention_width=8,
        num_parameters=400 * num_layers,
        mha=(BlockShape(100, 96),) * num_layers,
        mlp=(BlockShape(200, 192),) * num_layers,
        shared=(0,) * num_layers,
    )


def space(
    num_remove: int | None = None,
    ratio: float | None = None,
    blocks: Granularity = Granularity.MIX,
    shape: ModelShape = SHAPE,
    **limits: object,
) -> SearchSpace:
    return SearchSpace(shape=shape, blocks=blocks, budget=Budget(num_remove=num_remove, ratio=ratio), **limits)


class MadeUp:
    """An oracle over a function from mask and window to loss; counts what it is asked."""

    def __init__(self, loss: Callable[[Mask, int], float], num_windows: int = 8) -> None:
        self._loss = loss
        self.groups = [range(window, window + 1) for window in range(num_windows)]
        self.num_scored = 0
        self.steps: list[Step] = []
        self.rounds: list[Round] = []

    @property
    def dense(self) -> Score:
        return self._score(Mask(), self.groups)

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        groups = groups or self.groups
        self.num_scored += len(masks) * sum(len(group) for group in groups)
        return [self._score(mask, groups) for mask in masks]

    def removed(self, step: Step) -> Score:
        self.steps.append(step)
        return step.score

    def judged(self, judged: Round) -> None:
        self.rounds.append(judged)

    def _score(self, mask: Mask, groups: Sequence[range]) -> Score:
        return Score(mask, tuple(self._loss(mask, window) for group in groups for window in group), num_targets=1)


def by_block(loss_of: dict[str, float]) -> MadeUp:
    """The loss of a mask is that of the block that was removed last: of those that no mask before had."""
    seen: set[Block] = set()

    def loss(mask: Mask, window: int) -> float:
        new = [block for block in mask.absent if block not in seen]
        return max((loss_of[str(block)] for block in new), default=0.0)

    oracle = MadeUp(loss)
    removed = oracle.removed
    oracle.removed = lambda step: (removed(step), seen.update(step.block.parts))[0]  # type: ignore[method-assign]
    return oracle


def names(found: Found) -> list[str]:
    return [str(block) for block in found.blocks]


SCORES = {"mha.0": 3.0, "mha.1": 1.0, "mha.2": 2.0, "mlp.0": 2.5, "mlp.1": 1.5, "mlp.2": 9.0}


def greedy(scores: dict[str, float], *args: object, **kwargs: object) -> list[str]:
    return names(Greedy().run(space(*args, **kwargs), by_block(scores)))


def test_the_lowest_loss_goes_first() -> None:
    assert greedy(SCORES, 4) == ["mha.1", "mlp.1", "mha.2", "mlp.0"]


def test_a_ratio_stops_the_search_once_it_is_reached() -> None:
    assert greedy(SCORES, ratio=0.3) == ["mha.1", "mlp.1"]
    assert greedy(SCORES, ratio=0.31) == ["mha.1", "mlp.1", "mha.2"]


def test_ties_go_to_the_earlier_candidate_and_attention_comes_before_mlp() -> None:
    assert greedy(dict.fromkeys(SCORES, 1.0), 3) == ["mha.0", "mha.1", "mlp.0"]


def test_a_candidate_without_a_finite_score_is_never_chosen() -> None:
    assert greedy(SCORES | {"mha.1": math.nan, "mlp.1": math.inf}, 1) == ["mha.2"]


def test_per_parameter_a_small_block_goes_before_a_better_but_larger_one() -> None:
    scores = {"mha.0": 3.0, "mha.1": 1.3, "mha.2": 2.0, "mlp.0": 2.5, "mlp.1": 1.5, "mlp.2": 9.0}
    assert greedy(scores, 2) == ["mha.1", "mlp.1"]
    assert greedy(scores, 2, per=Per.PARAMS)[0] == "mlp.1"


def test_blocks_to_keep_and_limits_are_kept_to() -> None:
    assert greedy(SCORES, 3, keep=frozenset({Block(Kind.MHA, 1)})) == ["mlp.1", "mha.2", "mlp.0"]
    assert greedy(SCORES, 3, max_mha=1) == ["mha.1", "mlp.1", "mlp.0"]


def test_a_search_ends_before_a_loss_that_is_too_high() -> None:
    assert greedy(SCORES, 4, max_value=1.9) == ["mha.1", "mlp.1"]


STRATEGIES: dict[str, Strategy] = {
    "greedy": Greedy(),
    "lazy": Lazy(),
    "one-shot": OneShot(),
    "evolution": Evolution(generations=3, offspring=4),
}


def test_every_strategy_is_tried_here() -> None:
    """`multipruner` has spaces of its own (test_multipruner)."""
    assert sorted([*STRATEGIES, "multipruner"]) == list(Strategy.all())
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_where_every_candidate_fails_the_search_ends(strategy: Strategy) -> None:
    oracle = MadeUp(lambda mask, window: math.nan if mask.absent else 1.0)
    with pytest.raises(SearchFailed):
        strategy.run(space(2), oracle, seed=1)


def pairwise_loss(seed: int, num_layers: int) -> Callable[[Mask, int], float]:
    """Blocks have a cost each, and a cost together; windows differ. Much like a language model's, but for the size."""
    draw = np.random.default_rng(seed)
    names = [str(block) for block in Granularity.MIX.candidates(num_layers)]
    number = {name: index for index, name in enumerate(names)}
    single = draw.exponential(0.3, len(names))
    pairs = draw.normal(0.0, 0.006, (len(names), len(names)))
    windows = draw.normal(1.0, 0.3, (8, len(names)))

    def loss(mask: Mask, window: int) -> float:
        gone = sorted(number[str(block)] for block in mask.absent)
        own = float((single[gone] * windows[window, gone]).sum())
        return 3.0 + own + float(sum(pairs[one, other] for one in gone for other in gone if one < other))

    return loss


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(STRATEGIES)),
    num_remove=st.integers(1, 6),
    keep=st.sets(st.integers(0, 5), max_size=2),
    max_mha=st.none() | st.integers(3, 5),
)
def test_whatever_the_losses_a_mask_meets_budget_and_limits(
    seed: int, name: str, num_remove: int, keep: set[int], max_mha: int | None
) -> None:
    kept = frozenset(Block(Kind.MLP, layer) for layer in keep)
    searched = space(num_remove, shape=shape_of(6), keep=kept, max_mha=max_mha)
    oracle = MadeUp(pairwise_loss(seed, 6))
    found = STRATEGIES[name].run(searched, oracle, seed=1)
    assert len(found.blocks) == len(set(found.blocks)) == num_remove
    assert searched.allows(found.mask)
    assert found.scores[-1] == oracle.score([found.mask])[0]
    for number, score in enumerate(found.scores, start=1):
        assert score is None or score == oracle.score([Mask.of(found.blocks[:number])])[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.05, 0.6), name=st.sampled_from(sorted(STRATEGIES)))
def test_a_ratio_is_reached_by_every_strategy(seed: int, ratio: float, name: str) -> None:
    searched = space(ratio=ratio, shape=shape_of(5))
    found = STRATEGIES[name].run(searched, MadeUp(pairwise_loss(seed, 5)), seed=1)
    assert searched.is_met(found.mask)
    assert searched.allows(found.mask)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_searching_for_longer_never_ends_worse_than_greedy(seed: int) -> None:
    searched = space(5, shape=shape_of(6))
    start = Lazy().run(searched, MadeUp(pairwise_loss(seed, 6)))
    found = STRATEGIES["evolution"].run(searched, MadeUp(pairwise_loss(seed, 6)), seed=1)
    assert start.scores[-1] is not None
    assert found.scores[-1] is not None
    assert found.scores[-1].value <= start.scores[-1].value


def test_the_first_removal_of_one_shot_has_its_own_score_where_a_better_one_could_not_go() -> None:
    """mlp.0 is so small that the ratio would be out of reach if it went: only one MLP may go."""
    small, large = BlockShape(10, 8), BlockShape(200, 192)
    shape = replace(shape_of(2), num_parameters=1000, mlp=(small, large))
    searched = space(ratio=0.3, shape=shape, max_mlp=1)
    loss = {"mlp.0": 1.05, "mha.0": 1.1, "mha.1": 3.0, "mlp.1": 1.2}
    found = OneShot().run(searched, MadeUp(lambda mask, window: sum(loss[str(block)] for block in mask.absent)))
    assert names(found) == ["mha.0", "mlp.1"]
    assert found.scores[0] is not None
    assert found.scores[0].value == 1.1


def test_one_shot_takes_the_blocks_that_are_least_harmful_alone() -> None:
    found = OneShot().run(space(3), by_block(SCORES))
    assert names(found) == ["mha.1", "mlp.1", "mha.2"]


class TestLazy:
    def test_it_removes_what_greedy_removes_for_less(self) -> None:
        searched = space(8, shape=shape_of(12))
        for seed in range(5):
            oracles = {strategy: MadeUp(pairwise_loss(seed, 12)) for strategy in (Greedy(), Lazy())}
            orders = [strategy.run(searched, oracle).blocks for strategy, oracle in oracles.items()]
            assert orders[0] == orders[1]
            assert oracles[Lazy()].num_scored < oracles[Greedy()].num_scored / 2

    def test_what_it_removes_was_scored_in_full_and_the_rest_is_counted(self) -> None:
        oracle = MadeUp(pairwise_loss(3, 12))
        Lazy().run(space(6, shape=shape_of(12)), oracle)
        for step in oracle.steps:
            assert step.score in step.scores
            full = {score.mask for score in step.scores}
            partial = {estimate.mask for estimate in step.estimates}
            assert not full & partial
            assert full | partial <= {candidate.mask for candidate in step.candidates}
            assert all(0 < estimate.num_windows < 8 for estimate in step.estimates)
        assert len(oracle.steps[0].scores) + len(oracle.steps[0].estimates) == 24
        assert len(oracle.steps[-1].scores) + len(oracle.steps[-1].estimates) < 19

    @pytest.mark.parametrize("tolerance", [0.05, "1se"])
    def test_a_tolerance_saves_work(self, tolerance: float | Literal["1se"]) -> None:
        def work(tolerance: float | Literal["1se"]) -> int:
            oracle = MadeUp(pairwise_loss(5, 12))
            Lazy(tolerance=tolerance).run(space(8, shape=shape_of(12)), oracle)
            return oracle.num_scored

        assert work(tolerance) < work(0.0)

    def test_with_a_tolerance_only_what_goes_is_scored_in_full(self) -> None:
        oracle = MadeUp(pairwise_loss(3, 12))
        Lazy(tolerance=0.05).run(space(6, shape=shape_of(12)), oracle)
        assert [len(step.scores) for step in oracle.steps] == [1] * 6
        assert all(step.score in step.scores for step in oracle.steps)

    def test_a_removal_is_worse_than_the_best_one_by_the_tolerance_at_most_where_windows_agree(self) -> None:
        loss = pairwise_loss(3, 12)
        oracle = MadeUp(lambda mask, window: loss(mask, 0))
        Lazy(tolerance=0.02).run(space(6, shape=shape_of(12)), oracle)
        for step in oracle.steps:
            best = min(score.value for score in oracle.score([candidate.mask for candidate in step.candidates]))
            assert step.score.value <= best + 0.02

    @pytest.mark.parametrize("tolerance", [0.0, "1se"])
    @pytest.mark.parametrize("num_windows", [1, 2, 3, 13])
    def test_any_number_of_windows_will_do(self, num_windows: int, tolerance: float | Literal["1se"]) -> None:
        searched = space(4, shape=shape_of(6))
        loss = pairwise_loss(1, 6)
        oracle = MadeUp(lambda mask, window: loss(mask, window % 8), num_windows)
        found = Lazy(tolerance=tolerance).run(searched, oracle)
        assert len(found.blocks) == 4

    @pytest.mark.parametrize("tolerance", [0.0, "1se"])
    def test_candidates_that_fail_on_some_window_are_left_out(self, tolerance: float | Literal["1se"]) -> None:
        loss = pairwise_loss(1, 6)
        poison = Block(Kind.MLP, 2)
        found = Lazy(tolerance=tolerance).run(
            space(6, shape=shape_of(6)),
            MadeUp(lambda mask, window: math.nan if poison in mask.absent and window == 5 else loss(mask, window)),
        )
        assert poison not in found.blocks


def test_an_audit_finds_the_steps_in_which_a_better_block_was_there() -> None:
    searched = space(4, shape=shape_of(6))
    oracle = MadeUp(pairwise_loss(2, 6))
    right = Greedy().run(searched, oracle)
    wrong = right.blocks[1]
    candidates = [each for each in searched.neighbours(Mask.of(right.blocks[:1])) if each.block != wrong]
    other = oracle.score([candidates[0].mask])[0]
    found = Found((right.blocks[0], candidates[0].block), (right.scores[0], other))
    audits = list(audit(searched, found, oracle.dense, [1, 2], lambda step, masks: oracle.score(masks)))
    assert [each.chosen == each.best for each in audits] == [True, False]
    assert right.scores[1] is not None
    assert audits[1].best == wrong
    assert audits[1].regret == pytest.approx(other.value - right.scores[1].value)
    assert len(audited_steps(16, 4, seed=1)) == 4
    assert most_misses(0, 16) == pytest.approx(1 - 0.05 ** (1 / 16))
    assert most_misses(2, 2) == 1.0


def test_an_audit_asks_only_for_blocks_that_leave_the_target_in_reach() -> None:
    """The MLPs are dearer here, but without two of them the ratio cannot be reached."""
    shape = shape_of(3)
    searched = space(ratio=0.4, shape=shape, max_mha=1)
    oracle = by_block({f"mha.{n}": 0.1 * (n + 1) for n in range(3)} | {f"mlp.{n}": 1.0 + n for n in range(3)})
    found = Greedy().run(searched, oracle)
    steps = range(1, len(found.blocks) + 1)
    audits = list(audit(searched, found, oracle.dense, steps, lambda step, masks: oracle.score(masks)))
    assert [each.chosen for each in audits] == [each.best for each in audits] == list(found.blocks)


def test_mutations_see_what_greedy_does_not() -> None:
    """mha.0 is the best first removal, but mlp.0 and mlp.1 together are free."""

    def loss(mask: Mask, window: int) -> float:
        gone = {str(block) for block in mask.absent}
        if gone == {"mlp.0", "mlp.1"}:
            return 1.0
        return 1.0 + sum({"mha.0": 0.1, "mlp.0": 0.2, "mlp.1": 0.2}.get(name, 1.0) for name in gone)

    assert names(Greedy().run(space(2), MadeUp(loss)))[0] == "mha.0"
    # Blocks of one size, so that it does not begin with the search per parameter, which finds them.
    searched = space(2, shape=replace(SHAPE, mlp=SHAPE.mha))
    found = Evolution(generations=6, offspring=8).run(searched, MadeUp(loss), seed=0)
    assert set(names(found)) == {"mlp.0", "mlp.1"}
    assert found.scores[-1] is not None
    assert found.scores[-1].value == 1.0


def test_what_mutations_leave_of_greedys_order_stays_first_and_keeps_its_scores() -> None:
    loss_of = {"mha.0": 0.1, "mlp.0": 0.2, "mha.1": 0.3}

    def loss(mask: Mask, window: int) -> float:
        gone = {str(block) for block in mask.absent}
        return 1.0 if gone == {"mha.0", "mlp.1", "mlp.2"} else 1.0 + sum(loss_of.get(name, 1.0) for name in gone)

    searched = space(3, shape=replace(SHAPE, mlp=SHAPE.mha))
    start = Greedy().run(searched, MadeUp(loss))
    found = Evolution(generations=6, offspring=8).run(searched, MadeUp(loss), seed=0)
    assert names(start) == ["mha.0", "mlp.0", "mha.1"]
    assert names(found) == ["mha.0", "mlp.1", "mlp.2"]
    assert found.scores[0] == start.scores[0]
    assert found.scores[1] is None
    assert found.scores[2] is not None
    assert found.scores[2].value == 1.0


def test_evolution_is_the_same_for_a_seed() -> None:
    def run(seed: int) -> tuple[Found, list[list[Mask]]]:
        oracle = MadeUp(pairwise_loss(7, 6))
        found = Evolution(generations=4, offspring=6).run(space(5, shape=shape_of(6)), oracle, seed=seed)
        return found, [list(judged.masks) for judged in oracle.rounds]

    assert run(1) == run(1)
    assert run(1)[1] != run(2)[1]


@given(st.permutations(sorted(SCORES)))
def test_one_attention_always_survives(order: list[str]) -> None:
    removed = greedy({block: float(index) for index, block in enumerate(order)}, 5)
    assert len(removed) == 5
    assert sum(block.startswith("mha") for block in removed) <= 2


@pytest.mark.parametrize(
    ("blocks", "first", "num_candidates"),
    [(Granularity.MHA, "mha.1", 3), (Granularity.MLP, "mlp.1", 3), (Granularity.LAYER, "layer.1", 3)],
)
def test_the_granularity_decides_what_may_go(blocks: Granularity, first: str, num_candidates: int) -> None:
    assert len(space(1, blocks=blocks).candidates(Mask())) == num_candidates
    scores = SCORES if blocks is not Granularity.LAYER else SCORES | {"mlp.1": 1.0, "mlp.0": 3.0, "mlp.2": 2.0}
    assert greedy(scores, 1, blocks=blocks) == [first]


@pytest.mark.parametrize(
    ("num_remove", "ratio", "blocks", "limits", "message"),
    [
        (0, None, Granularity.MIX, {}, "at least 1"),
        (6, None, Granularity.MIX, {}, "from 1 to 5"),
        (3, None, Granularity.LAYER, {}, "from 1 to 2"),
        (None, 0.0, Granularity.MIX, {}, "between 0 and 1"),
        (None, 1.0, Granularity.MIX, {}, "between 0 and 1"),
        (None, 0.5, Granularity.MHA, {}, "at most 0.2"),
        (None, 0.9, Granularity.MIX, {}, "at most 0.8"),
        (None, None, Granularity.MIX, {}, "expected one of"),
        (1, 0.5, Granularity.MIX, {}, "expected one of"),
        (4, None, Granularity.MIX, {"max_mha": 1, "max_mlp": 2}, "from 1 to 3 .*with `max_mha`, with `max_mlp`"),
        (5, None, Granularity.MIX, {"keep": frozenset({Block(Kind.MLP, 0)})}, "from 1 to 4 .*with `keep`"),
        (1, None, Granularity.MIX, {"keep": frozenset({Block(Kind.MLP, 7)})}, "layers 0 to 2, got mlp.7"),
        (1, None, Granularity.LAYER, {"max_mha": 1}, "single blocks"),
        (None, 0.5, Granularity.MIX, {"max_mlp": 1}, "at most 0.4"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    num_remove: int | None, ratio: float | None, blocks: Granularity, limits: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        space(num_remove, ratio, blocks, **limits)


@pytest.mark.parametrize("blocks", [Granularity.MIX, Granularity.LAYER])
@pytest.mark.parametrize("strategy", [Greedy(), Lazy()], ids=["greedy", "lazy"])
def test_greedy_and_lazy_find_the_order_and_the_scores_of_the_official_loop(
    blocks: Granularity, strategy: Strategy
) -> None:
    model, windows = tiny_llama(), random_windows()
    decoder = Decoder(model)
    forked = ForkedPass(decoder, CallShape(sequences_per_call=4, tokens_per_head_call=64))
    searched = SearchSpace(shape=decoder.shape, blocks=blocks, budget=Budget(num_remove=3))
    found = strategy.run(searched, Forked(forked, windows))
    official = plain_search(model, windows, 3, blocks)
    assert list(found.blocks) == [block for block, _ in official]
    values = [score.value for score in found.scores if score is not None]
    assert values == pytest.approx([score.value for _, score in official], rel=1e-13)


class Forked(MadeUp):
    """An oracle over a real model."""

    def __init__(self, forked: ForkedPass, windows: Tensor) -> None:
        super().__init__(lambda mask, window: math.nan, len(windows))
        self._forked = forked
        self._windows = windows

    @property
    def dense(self) -> Score:
        return self.score([Mask()])[0]

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        chosen = self._windows[[window for group in groups or self.groups for window in group]]
        sums = self._forked.window_sums(masks, chosen).tolist()
        return [Score(mask, tuple(row), chosen.shape[1] - 1) for mask, row in zip(masks, sums, strict=True)]


class TestFailures:
    """Losses that are not finite, in the places where a strategy might trip over them."""

    def test_where_all_in_the_race_fail_on_the_last_window_the_others_are_looked_at(self) -> None:
        loss = pairwise_loss(1, 6)
        good = {Block(Kind.MLP, 5)}

        def failing(mask: Mask, window: int) -> float:
            return math.nan if window == 7 and mask.absent and not good & mask.absent else loss(mask, window)

        searched = space(3, shape=shape_of(6))
        assert Lazy().run(searched, MadeUp(failing)).blocks == Greedy().run(searched, MadeUp(failing)).blocks

    def test_a_block_that_failed_once_may_go_later(self) -> None:
        def failing(mask: Mask, window: int) -> float:
            gone = {str(block) for block in mask.absent}
            return math.nan if gone & {"mlp.0", "mlp.1"} and "mha.1" not in gone else 1.0 + 0.1 * len(gone)

        searched = space(4, max_mha=2)
        lazy, greedy = (strategy.run(searched, MadeUp(failing)) for strategy in (Lazy(), Greedy()))
        assert set(names(lazy)) == set(names(greedy))

    def test_a_final_mask_of_one_shot_that_fails_is_no_result(self) -> None:
        def failing(mask: Mask, window: int) -> float:
            return math.nan if len(mask.absent) > 1 else 1.0

        with pytest.raises(SearchFailed, match="together"):
            OneShot().run(space(2), MadeUp(failing))

    def test_evolution_goes_on_from_the_searches_that_did_not_fail(self) -> None:
        def failing(mask: Mask, window: int) -> float:
            return math.nan if {str(block) for block in mask.absent} == {"mha.0", "mlp.0"} else 1.0

        found = Evolution(generations=1, offspring=2).run(space(4), MadeUp(failing), seed=1)
        assert len(found.blocks) == 4


def test_small_blocks_do_not_use_up_the_room_that_a_ratio_needs() -> None:
    shape = ModelShape(
        hidden_size=8,
        vocab_size=50,
        attention_width=8,
        num_parameters=1000,
        mha=(BlockShape(10, 8),) * 4,
        mlp=tuple(BlockShape(size, size) for size in (100, 100, 300, 300)),
        shared=(0,) * 4,
    )
    searched = space(ratio=0.4, max_mlp=2, max_mha=2, shape=shape)
    loss_of = {"mlp.2": 0.5, "mlp.3": 0.6}

    def loss(mask: Mask, window: int) -> float:
        return 1.0 + sum(loss_of.get(str(block), 0.1) for block in mask.absent)

    for name, strategy in STRATEGIES.items():
        assert searched.is_met(strategy.run(searched, MadeUp(loss), seed=1).mask), name


def test_after_a_refit_a_rival_stays_longer_in_the_race() -> None:
    """The same losses say less about a candidate whose windows were scored before the blocks were refitted."""
    first, second, removed = Block(Kind.MHA, 0), Block(Kind.MLP, 0), Block(Kind.MHA, 2)
    stays = {}
    for is_refitted in (False, True):
        drift = Drift(space(num_remove=2), [8] * 4, num_targets=31)
        base, windows = Score(Mask(), (31.0,) * 32, 31), list(range(32))
        for block, loss in ((first, 32.0), (second, 33.0)):
            drift.observe(block, base, windows, [loss] * 32)
        drift.settle()
        drift.advance(removed, is_refitted=is_refitted)
        drift.observe(first, base, windows, [32.0] * 32)
        drift.observe(second, base, windows[:8], [33.0, 32.8] * 4)
        gaps = np.linspace(0.0, 20.0, 2001)
        stays[is_refitted] = max(gap for gap in gaps if drift.rivals([second], first, gap, 0.0) == [])
    assert stays[True] < 0.7 * stays[False]


def test_a_search_goes_on_from_the_score_of_the_refitted_model() -> None:
    """Per parameter, a refit that lowers the base makes later increases count in full."""

    values = {"mha.0": 1.0, "mha.1": 1.2, "mlp.0": 3.0, "mlp.1": 4.0, "mlp.2": 5.0, "mha.2": 9.0}

    class Refitting(MadeUp):
        def removed(self, step: Step) -> Score:
            super().removed(step)
            return replace(step.score, window_sums=tuple(value - 100.0 for value in step.score.window_sums))

    def loss(mask: Mask, window: int) -> float:
        return sum(values[str(block)] for block in mask.absent)

    plain, refitted = (names(Greedy().run(space(2, per=Per.PARAMS), kind(loss))) for kind in (MadeUp, Refitting))
    assert (plain, refitted) == (["mha.0", "mha.1"], ["mha.0", "mlp.0"])
