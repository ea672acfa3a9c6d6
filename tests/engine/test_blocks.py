import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
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


@pytest.mark.parametrize("text", ["mha", "mha.", "ffn.3", "mha.-1", "mha.1.2", ""])
def test_a_word_that_is_no_block_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a block such as"):
        Block.parse(text)
