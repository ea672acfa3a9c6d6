import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.engine.blocks import NUM_GROUPS, Block, Granularity, Kind, Mask, amount, are_removals, removals_told
from blockpruner.engine.errors import UserError

blocks = st.builds(Block, st.sampled_from([Kind.MHA, Kind.MLP]), st.integers(0, 99))


@given(st.frozensets(blocks))
def test_a_mask_survives_printing_and_parsing(absent: frozenset[Block]) -> None:
    mask = Mask(absent)
    assert Mask.parse(str(mask)) == mask
    assert hash(Mask.parse(str(mask))) == hash(mask)


def test_candidates_come_in_the_official_order_all_attention_first() -> None:
    assert [str(block) for block in Granularity.MIX.candidates(2)] == ["mha.0", "mha.1", "mlp.0", "mlp.1"]
    assert [str(block) for block in Granularity.MLP.candidates(2)] == ["mlp.0", "mlp.1"]
    assert [str(block) for block in Granularity.LAYER.candidates(2)] == ["layer.0", "layer.1"]


def test_removing_a_layer_removes_both_of_its_blocks() -> None:
    assert str(Mask().without(Block(Kind.LAYER, 3))) == "mha.3+mlp.3"


@given(st.dictionaries(st.integers(0, 20), st.integers(0, NUM_GROUPS)))
def test_a_mask_with_groups_survives_printing_and_json_and_holds_a_block_or_its_groups(
    kept: dict[int, int],
) -> None:
    mask = Mask()
    for layer, number in kept.items():
        for part in range(NUM_GROUPS, max(number, 1), -1):
            mask = mask.without(Block(Kind.MLP, layer, part))
        mask = mask if number else mask.without(Block(Kind.MLP, layer))
    assert Mask.parse(str(mask)) == mask
    assert Mask.of(Block.from_json(block.to_json()) for block in mask.absent) == mask
    for layer, number in kept.items():
        assert mask.keeps(Kind.MLP, layer) == (number > 0)
        assert mask.lacking.get(Block(Kind.MLP, layer), 0) == (NUM_GROUPS - number if number else 0)


def test_groups_go_from_the_last_to_the_first() -> None:
    assert str(Mask.parse("mlp.7/3+mlp.7/4")) == "mlp.7/4+mlp.7/3"
    assert str(Mask.parse("mlp.7/4+mlp.7")) == "mlp.7"
    assert Block.parse("mlp.7/4").to_json() == ["mlp", 7, 4]
    for text in ("mlp.7/3", "mlp.7/4+mlp.7/2", "mha.2/8+mha.2/6"):
        with pytest.raises(UserError, match="to go from the last to the first"):
            Mask.parse(text)

    def blocks(text: str) -> list[Block]:
        return [Block.parse(one) for one in text.split()]

    assert are_removals(blocks("mlp.7/4 mha.2/8 mlp.7/3 mha.2/7 mlp.7/2 mlp.7 mha.2"))
    for text in ("mlp.7/3", "mlp.7/4 mlp.7/2", "mlp.7/4 mlp.7/4", "mlp.7 mlp.7/4", "mha.2/8 mha.2/6", "mha.2 mha.2"):
        assert not are_removals(blocks(text))


@pytest.mark.parametrize(
    "text",
    [
        "mha",
        "mha.",
        "ffn.3",
        "mha.-1",
        "mha.1.2",
        "",
        "mlp.7/",
        "mlp.7/1",
        "mlp.7/5",
        "mha.7/1",
        "layer.7/2",
        "mlp.7/x",
    ],
)
def test_a_word_that_is_no_block_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a block such as"):
        Block.parse(text)


@given(st.sets(blocks))
def test_whole_blocks_are_counted_as_blocks(removed: set[Block]) -> None:
    assert amount(removed) == removals_told([*removed]) == f"{len(removed)} blocks"


@pytest.mark.parametrize(
    ("removed", "gone", "removals"),
    [
        ("mlp.7/4", "1 group of channels", "1 blocks and parts of blocks"),
        ("mlp.7/4 mlp.7/3 mlp.7/2 mlp.7", "1 blocks", "4 blocks and parts of blocks"),
        ("mlp.7/4 mha.2/8 mlp.7/3", "2 groups of channels and 1 KV head", "3 blocks and parts of blocks"),
        (
            "mlp.7/4 mha.2/8 mha.2/7 mha.1 mha.3",
            "2 blocks, 1 group of channels and 2 KV heads",
            "5 blocks and parts of blocks",
        ),
        ("mha.1 layer.3 mlp.7/4", "2 blocks and 1 group of channels", "3 blocks and parts of blocks"),
    ],
)
def test_groups_are_not_counted_as_blocks(removed: str, gone: str, removals: str) -> None:
    found = [Block.parse(one) for one in removed.split()]
    assert (amount(found), removals_told(found)) == (gone, removals)
