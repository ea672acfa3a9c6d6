"""Blocks with some of their channels or heads: the forked pass against models that are physically narrower."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockpruner.engine.blocks import NUM_GROUPS, Block, Kind, Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.narrowing_check import check_narrowable
from blockpruner.engine.model.surgery import check_cache, prune
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.reference import plain_score
from blockpruner.engine.work.shape import BlockShape
from tests.conftest import generate, random_windows, tiny_llama
from tests.engine.architectures import ROWS

MODELS = {
    "llama": tiny_llama(),
    "biases": tiny_llama(seed=4, attention_bias=True, mlp_bias=True),
    "fused gate and up": ROWS["phi3"].model(),
    "Conv1D": ROWS["gpt2"].model(),
}
WHOLE_ONLY = ["opt", "mixtral", "gpt_oss", "granitemoeshared"]
NARROWER = [name for name in ROWS if name not in (*WHOLE_ONLY, "gemma4")]


class Comparing(nn.Module):
    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return gate / gate.abs().mean(-1, keepdim=True)


def order_of(decoder: Decoder, seed: int = 0) -> ChannelOrder:
    draw = np.random.default_rng(seed)
    return ChannelOrder(
        {block: draw.permutation(one.num_channels).astype(np.int32) for block, one in decoder.narrow.items()}
    )


def groups_gone(layer: int, number: int) -> list[Block]:
    """The removals after which an MLP has `number` groups left."""
    parts = [Block(Kind.MLP, layer, part) for part in range(NUM_GROUPS, max(number, 1), -1)]
    return parts if number else [Block(Kind.MLP, layer)]


mlps = st.tuples(*[st.integers(0, NUM_GROUPS).map(lambda number, n=n: groups_gone(n, number)) for n in range(4)])
attentions = st.sets(st.sampled_from([Block(Kind.MHA, layer) for layer in range(4)]), max_size=3)
heads = st.sets(st.sampled_from([Block(Kind.MHA, layer, 2) for layer in range(4)]))
masks = st.builds(lambda some, gone: Mask.of([*some, *chain(*gone)]), attentions, mlps)
masks_with_heads = st.builds(lambda mask, gone: Mask.of([*mask.absent, *gone]), masks, heads)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), sequences_per_call=st.integers(1, 20), seed=st.integers(0, 9))
def test_any_set_of_masks_scores_exactly_as_physically_narrower_models_do(
    name: str, data: st.DataObject, sequences_per_call: int, seed: int
) -> None:
    model = MODELS[name]
    windows = random_windows(num_windows=2) % model.config.vocab_size
    decoder = Decoder(model)
    has_heads = Block(Kind.MHA, 0) in decoder.narrow
    found = data.draw(st.lists(masks_with_heads if has_heads else masks, min_size=1, max_size=5))
    order = order_of(decoder, seed)
    plain = [plain_score(model, mask, windows, order).window_sums for mask in found]
    call_shape = CallShape(sequences_per_call=sequences_per_call, tokens_per_head_call=30)
    decoder.put_in_order(order)
    try:
        sums = ForkedPass(decoder, call_shape).window_sums(found, windows)
    finally:
        decoder.put_in_order(None)
    torch.testing.assert_close(sums, torch.tensor(plain, dtype=torch.float64), rtol=1e-12, atol=0)


def test_bringing_channels_into_an_order_and_back_leaves_every_bit() -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    decoder = Decoder(model)
    decoder.put_in_order(order_of(decoder))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    decoder.put_in_order(None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def check_narrower(decoder: Decoder, mask: Mask, order: ChannelOrder, tolerance: float) -> None:
    """Check a mask's physically narrower model: its cache, its size, and that the forked pass scores it so."""
    model, windows = decoder.model, random_windows(num_windows=1) % 120
    narrower = prune(model, mask, order)
    check_cache(narrower)
    assert sum(weight.numel() for weight in narrower.parameters()) == decoder.shape.num_parameters - (
        decoder.shape.num_removed(mask)
    )
    plain = plain_score(model, mask, windows, order).value
    decoder.put_in_order(order)
    sums = ForkedPass(decoder, CallShape(sequences_per_call=3, tokens_per_head_call=30)).window_sums([mask], windows)
    assert sums.sum().item() / (windows.shape[1] - 1) == pytest.approx(plain, rel=max(tolerance, 1e-12))


@pytest.mark.parametrize("name", NARROWER)
def test_channels_of_every_family_with_ordinary_mlps_can_be_removed(name: str) -> None:
    row = ROWS[name]
    decoder = Decoder(row.model())
    check_narrowable(decoder)
    order = order_of(decoder)
    layers = sorted(block.layer for block in decoder.narrow if block.kind is Kind.MLP)
    mask = Mask.of([Block(Kind.MHA, 1), *groups_gone(layers[0], 3), *groups_gone(layers[-1], 1)])
    check_narrower(decoder, mask, order, row.tolerance)


COUNT_ALL_HEADS = [
    "opt", "stablelm", "stablelm parallel", "gpt_neo (no row in the engine)", "gptj (no row in the engine)",
]  # fmt: skip
WITH_HEADS = [
    "llama", "llama biased", "mistral sliding", "qwen2", "qwen2 sliding", "qwen3", "gemma2", "gemma3", "granite",
    "starcoder2", "cohere", "mixtral", "qwen3_moe", "phi (no row in the engine)",
    *COUNT_ALL_HEADS,
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_of_attentions_can_be_removed_or_the_family_is_refused_by_name(name: str) -> None:
    row = ROWS[name]
    decoder = Decoder(row.model())
    if name in COUNT_ALL_HEADS:
        with pytest.raises(
            UserError, match=r"parts of blocks cannot be removed|no attention whose heads can be removed"
        ):
            check_narrowable(decoder, (Kind.MHA,))
        return
    check_narrowable(decoder, (Kind.MHA,))
    order = order_of(decoder)
    groups = decoder.shape.groups(Block(Kind.MHA, 3))
    mask = Mask.of([Block(Kind.MHA, 1), Block(Kind.MHA, 0, decoder.narrow[Block(Kind.MHA, 0)].num_groups), *groups])
    check_narrower(decoder, mask, order, row.tolerance)


@pytest.mark.parametrize(("name", "kinds", "fitting"), [
    ("stablelm", (Kind.MHA, Kind.MLP), "`units=channels` or `units=blocks`"),
    ("stablelm", (Kind.MHA,), "`units=channels` or `units=blocks`"),
    ("opt", (Kind.MHA,), "`units=blocks`"),
    ("mixtral", (Kind.MLP,), "`units=heads` or `units=blocks`"),
])  # fmt: skip
def test_a_refusal_names_the_units_that_can_be_removed(name: str, kinds: tuple[Kind, ...], fitting: str) -> None:
    with pytest.raises(UserError, match=rf"; use {fitting}\."):
        check_narrowable(Decoder(ROWS[name].model()), kinds)


def test_a_narrower_attention_generates_with_every_cache() -> None:
    model = tiny_llama(torch.float32, num_key_value_heads=4)
    decoder = Decoder(model)
    narrower = prune(model, Mask.parse("mha.0/4+mha.1/4+mha.1/3+mha.1/2+mlp.0+mha.2+mlp.3/4"), order_of(decoder))
    plain = generate(narrower, use_cache=False)
    assert generate(narrower) == plain
    assert generate(narrower, cache_implementation="static") == plain


@pytest.mark.parametrize("name", WHOLE_ONLY)
def test_a_family_whose_mlps_can_only_be_removed_whole_is_refused_by_name(name: str) -> None:
    model = ROWS[name].model()
    with pytest.raises(
        UserError, match=f"model type '{model.config.model_type}' has no MLP whose channels can be removed"
    ):
        check_narrowable(Decoder(model))
    with pytest.raises(UserError, match="can only be removed as a whole"):
        prune(model, Mask.parse("mlp.1/4"))


def test_an_mlp_that_compares_its_channels_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[2].mlp.act_fn = Comparing()
    with pytest.raises(UserError, match="layer 2 does not give what it gives with zeros for the others"):
        check_narrowable(Decoder(model))


def test_groups_without_an_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"expected the order of the 48 channels of mlp\.1"):
        prune(tiny_llama(), Mask.parse("mlp.1/4"))


@pytest.mark.parametrize(
    ("num_channels", "widths"),
    [(1536, [384, 768, 1152]), (11008, [2816, 5504, 8192]), (576, [128, 256, 448]), (96, [24, 48, 72]), (5, [1, 2, 4])],
)
def test_widths_are_quarters_in_multiples_that_gpus_like(num_channels: int, widths: list[int]) -> None:
    shape = BlockShape(0, 0, num_channels=num_channels)
    assert [shape.width(number) for number in (1, 2, 3, 4)] == [*widths, num_channels]
