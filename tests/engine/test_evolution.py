"""Evolution where blocks go in groups: what any mutation obeys, and what it finds that single removals do not."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask, Units, are_removals
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.strategies.evolution import Evolution, mutate
from blockpruner.engine.strategies.lazy import Lazy
from blockpruner.engine.work.shape import BlockShape, ModelShape
from tests.engine.test_search import MadeUp, names

NUM_LAYERS = 5
ATTENTION = BlockShape(100, 96, num_channels=3, channel_parameters=30, channel_matmul_weights=30, num_groups=3)
MLP = BlockShape(200, 192, num_channels=24, channel_parameters=8, channel_matmul_weights=8)
WHOLE = BlockShape(150, 140)
SHAPE = ModelShape(
    hidden_size=8,
    vocab_size=50,
    attention_width=8,
    num_parameters=1900,
    mha=(ATTENTION,) * NUM_LAYERS,
    mlp=(MLP, MLP, WHOLE, MLP, MLP),  # one is made of experts, say
    shared=(4,) * NUM_LAYERS,
)

spaces = st.builds(
    lambda units, budget, keep, max_mha, max_mlp: SearchSpace(
        shape=SHAPE,
        blocks=Granularity.MIX,
        budget=budget,
        keep=frozenset(keep),
        max_mha=max_mha,
        max_mlp=max_mlp,
        units=units,
    ),
    st.sampled_from(Units),
    st.one_of(
        st.builds(lambda number: Budget(num_remove=number), st.integers(1, 6)),
        st.builds(lambda share: Budget(ratio=share), st.floats(0.02, 0.4)),
    ),
    st.sets(st.sampled_from(Granularity.MIX.candidates(NUM_LAYERS)), max_size=1),
    st.none() | st.integers(3, 4),
    st.none() | st.integers(3, 4),
)


def walk(searched: SearchSpace, draw: random.Random) -> Mask:
    """A mask that meets the budget, by random removals."""
    mask = Mask()
    while candidates := searched.candidates(mask):
        mask = draw.choice(candidates).mask
    return mask


def are_last_groups(mask: Mask) -> bool:
    """Whether of each block the last groups are absent, and none beside a block that is absent itself."""
    for block, number in mask.lacking.items():
        parts = {one.part for one in mask.absent if one.whole == block}
        last = SHAPE.block(block).num_groups
        if block in mask.absent or parts != set(range(last, last - number, -1)):
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(searched=spaces, seed=st.integers(0, 10**6))
def test_any_mutation_obeys_the_rules_of_masks_the_budget_and_the_limits(searched: SearchSpace, seed: int) -> None:
    draw = random.Random(seed)
    mask = walk(searched, draw)
    for _ in range(8):
        child = mutate(searched, mask, draw)
        if child is None:
            continue
        assert are_last_groups(child)
        assert searched.allows(child)
        assert searched.is_met(child)
        if searched.budget.num_remove is not None:
            assert searched.num_removed(child) == searched.budget.num_remove
        assert not any(searched.is_met(each.mask) for each in searched.returns(child)), "there is none to spare"
        mask = child


@settings(max_examples=60, deadline=None)
@given(searched=spaces, seed=st.integers(0, 10**6))
def test_what_goes_next_comes_back_first(searched: SearchSpace, seed: int) -> None:
    mask = walk(searched, random.Random(seed))
    removals = searched.removed(mask)
    assert are_removals(removals)
    assert Mask.of(removals) == mask
    assert len(removals) == searched.num_removed(mask)
    returns = searched.returns(mask)
    assert {each.block.whole for each in returns} == {block.whole for block in mask.absent}
    for each in returns:
        assert are_last_groups(each.mask)
        assert searched.next_unit(each.block.whole, each.mask) == each.block
        assert each.mask.without(each.block) == mask


@settings(max_examples=10, deadline=None)
@given(searched=spaces, seed=st.integers(0, 10**6))
def test_an_order_of_removals_is_found_no_worse_than_that_of_lazy(searched: SearchSpace, seed: int) -> None:
    def loss(mask: Mask, window: int) -> float:
        return math.fsum(random.Random(f"{seed} {block} {window}").random() for block in mask.absent)

    oracle = MadeUp(loss)
    found = Evolution(generations=2, offspring=4).run(searched, oracle, seed=seed)
    assert are_removals(found.blocks)
    assert searched.is_met(found.mask)
    assert searched.allows(found.mask)
    assert found.scores[-1] == oracle.score([found.mask])[0]
    for number, score in enumerate(found.scores, start=1):
        assert score is None or score == oracle.score([Mask.of(found.blocks[:number])])[0]
    start = Lazy().run(searched, MadeUp(loss)).scores[-1]
    assert start is not None
    assert found.scores[-1].value <= start.value
    again = Evolution(generations=2, offspring=4).run(searched, MadeUp(loss), seed=seed)
    assert again == found


def test_groups_that_are_free_only_together_are_found() -> None:
    """Any first group costs more than an attention, but two of the same MLP are free."""
    single = {"mha.0": 0.1, "mha.1": 0.15}
    searched = SearchSpace(
        shape=replace(SHAPE, mlp=(MLP,) * NUM_LAYERS),
        blocks=Granularity.MIX,
        budget=Budget(num_remove=2),
        units=Units.CHANNELS,
        max_mha=3,
    )

    def loss(mask: Mask, window: int) -> float:
        gone = {str(block) for block in mask.absent}
        return 1.0 if gone == {"mlp.1/4", "mlp.1/3"} else 1.0 + sum(single.get(name, 0.5) for name in gone)

    assert names(Lazy().run(searched, MadeUp(loss))) == ["mha.0", "mha.1"]
    assert names(Evolution(generations=12, offspring=12).run(searched, MadeUp(loss))) == ["mlp.1/4", "mlp.1/3"]


@pytest.mark.parametrize(("num_remove", "num_layers"), [(10, 2), (5, 1), (9, None)])
def test_a_start_by_whole_layers_counts_what_the_groups_count(num_remove: int, num_layers: int | None) -> None:
    searched = SearchSpace(
        shape=replace(SHAPE, mlp=(MLP,) * NUM_LAYERS),
        blocks=Granularity.MIX,
        budget=Budget(num_remove=num_remove),
        units=Units.CHANNELS,
    )
    oracle = MadeUp(lambda mask, window: 1.0 + sum(block.layer + 1 for block in mask.absent if block.part is None))
    found = Evolution(generations=1, offspring=1).run(searched, oracle)
    by_layers = [judged.best.mask for judged in oracle.rounds if judged.name.startswith("greedy by layers")]
    assert len(by_layers) == (num_layers or 0)
    assert searched.num_removed(found.mask) == num_remove
    if by_layers:
        layers = [Block(Kind.LAYER, layer) for layer in range(num_layers or 0)]
        assert by_layers[-1] == Mask.of(layers)
        assert searched.num_removed(by_layers[-1]) == num_remove
