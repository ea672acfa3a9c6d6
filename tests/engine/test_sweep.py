"""The plan of a forked pass, without a model: every mask's row goes through exactly the blocks that it keeps."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.work.shape import BlockShape, ModelShape
from blockpruner.engine.work.sweep import plan_sweep

NUM_LAYERS = 4
SHAPE = ModelShape(
    hidden_size=8,
    vocab_size=50,
    attention_width=8,
    num_parameters=10_000,
    mha=(BlockShape(300, 256),) * NUM_LAYERS,
    mlp=(BlockShape(400, 384),) * NUM_LAYERS,
    shared=(0,) * NUM_LAYERS,
)
single = st.builds(Block, st.sampled_from([Kind.MHA, Kind.MLP]), st.integers(0, NUM_LAYERS - 1))
mask_sets = st.lists(st.builds(Mask, st.frozensets(single)), min_size=1, max_size=12)


@given(mask_sets)
def test_each_mask_passes_through_exactly_the_blocks_that_it_keeps(masks: list[Mask]) -> None:
    plan = plan_sweep(masks, NUM_LAYERS)
    passed: dict[int, list[str]] = {0: []}
    for layer, families in enumerate(plan.layers):
        before = {slot: list(path) for slot, path in passed.items()}
        for family in families:
            for child in family.children:
                path = list(before[family.parent])
                path += [f"mha.{layer}"] * child.mha + [f"mlp.{layer}"] * child.mlp
                passed[child.slot] = path
    for mask, slot in zip(masks, plan.slot_of, strict=True):
        kept = [f"{kind}.{n}" for n in range(NUM_LAYERS) for kind in (Kind.MHA, Kind.MLP) if mask.keeps(kind, n)]
        assert passed[slot] == kept


@given(mask_sets)
def test_a_block_is_computed_once_for_each_distinct_prefix(masks: list[Mask]) -> None:
    plan = plan_sweep(masks, NUM_LAYERS)
    order = [Block(kind, layer) for layer in range(NUM_LAYERS) for kind in (Kind.MHA, Kind.MLP)]
    expected: Counter[Block] = Counter()
    for index, block in enumerate(order):
        prefixes = {tuple(b in mask.absent for b in order[:index]) for mask in masks if block not in mask.absent}
        expected[block] = len(prefixes)
    for layer, families in enumerate(plan.layers):
        assert sum(family.num_mha for family in families) == expected[Block(Kind.MHA, layer)]
        assert sum(family.num_mlp for family in families) == expected[Block(Kind.MLP, layer)]
    assert plan.num_slots == len(set(masks))
    tokens = 7
    flops = sum(SHAPE.block_flops(block, tokens) * count for block, count in expected.items())
    assert plan.flops(SHAPE, tokens) == flops + len(set(masks)) * SHAPE.head_flops(tokens)


@given(st.lists(st.sets(st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, 3))), min_size=1, max_size=8))
def test_a_narrower_block_is_computed_once_for_each_distinct_prefix(choices: list[set[tuple[int, int]]]) -> None:
    """Of each layer, some masks lack groups of the MLP, or a KV head of the attention."""
    channels = BlockShape(400, 384, num_channels=16, channel_parameters=24, channel_matmul_weights=24)
    heads = BlockShape(300, 256, num_channels=2, channel_parameters=128, channel_matmul_weights=128, num_groups=2)
    shape = replace(SHAPE, mha=(heads,) * NUM_LAYERS, mlp=(channels,) * NUM_LAYERS)
    masks = []
    for chosen in choices:
        lacking = dict(sorted(chosen))
        groups = [Block(Kind.MLP, layer, part) for layer, n in lacking.items() for part in range(4, 4 - n, -1)]
        masks.append(Mask.of([*groups, *(Block(Kind.MHA, layer, 2) for layer, n in lacking.items() if n == 1)]))
    order = [Block(kind, layer) for layer in range(NUM_LAYERS) for kind in (Kind.MHA, Kind.MLP)]
    tokens, flops = 7, len(set(masks)) * shape.head_flops(7)
    for index, block in enumerate(order):
        paths = {tuple(mask.lacking.get(one, 0) for one in order[: index + 1]) for mask in masks}
        flops += sum(shape.block_flops(block, tokens, path[-1]) for path in paths)
    assert plan_sweep(masks, NUM_LAYERS).flops(shape, tokens) == flops
    assert shape.forward_flops(Mask(), tokens) - shape.forward_flops(Mask.parse("mlp.1/4"), tokens) == 2 * 4 * 24 * 7
    less = shape.forward_flops(Mask(), tokens) - shape.forward_flops(Mask.parse("mha.1/2"), tokens)
    assert less == 2 * 128 * tokens + 2 * tokens**2 * 4


def test_one_exhaustive_step_costs_about_half_of_the_plain_loop() -> None:
    num_layers = 32
    shape = ModelShape(
        hidden_size=4096,
        vocab_size=32000,
        attention_width=4096,
        num_parameters=6_738_415_616,
        mha=(BlockShape(4 * 4096**2 + 4096, 4 * 4096**2),) * num_layers,
        mlp=(BlockShape(3 * 4096 * 11008 + 4096, 3 * 4096 * 11008),) * num_layers,
        shared=(0,) * num_layers,
    )
    masks = [Mask().without(block) for block in Granularity.MIX.candidates(num_layers)]
    naive = sum(shape.forward_flops(mask, 2048) for mask in masks)
    assert 1.85 < naive / plan_sweep(masks, num_layers).flops(shape, 2048) < 2.0


def test_work_is_counted_as_documented_on_smollm2s_shape() -> None:
    shape = ModelShape(
        hidden_size=576,
        vocab_size=49152,
        attention_width=576,
        num_parameters=134_515_008,
        mha=(BlockShape(885_312, 884_736),) * 30,
        mlp=(BlockShape(2_654_784, 2_654_208),) * 30,
        shared=(0,) * 30,
    )
    tokens = 512
    attention = 2 * 884_736 * tokens + 2 * tokens**2 * 576
    mlp = 2 * 2_654_208 * tokens
    head = 2 * 28_311_552 * tokens
    assert shape.forward_flops(Mask(), tokens) == 30 * (attention + mlp) + head
    assert shape.forward_flops(Mask.parse("mha.3+mlp.7"), tokens) == 29 * (attention + mlp) + head
