"""The forked pass against the plain one: full forwards with the blocks physically absent."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.losses import token_nll
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.reference import plain_score
from tests.conftest import random_windows, tiny_llama

CALL_SHAPE = CallShape(sequences_per_call=5, tokens_per_head_call=7)
MODELS = {
    "grouped heads": tiny_llama(),
    "tied embeddings": tiny_llama(seed=3, tie_word_embeddings=True),
    "biases": tiny_llama(seed=4, attention_bias=True, mlp_bias=True),
}
single = st.builds(Block, st.sampled_from([Kind.MHA, Kind.MLP]), st.integers(0, 3))


def has_attention(mask: Mask) -> bool:
    return any(mask.keeps(Kind.MHA, layer) for layer in range(4))


masks_of_any_kind = st.builds(Mask, st.frozensets(single)).filter(has_attention)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12)
@given(
    masks=st.lists(masks_of_any_kind, min_size=1, max_size=10),
    sequences_per_call=st.integers(1, 40),
    tokens_per_head_call=st.integers(1, 40),
)
def test_any_set_of_masks_scores_exactly_as_full_forwards_do(
    name: str, masks: list[Mask], sequences_per_call: int, tokens_per_head_call: int
) -> None:
    model = MODELS[name]
    windows = random_windows()
    call_shape = CallShape(sequences_per_call=sequences_per_call, tokens_per_head_call=tokens_per_head_call)
    sums = ForkedPass(Decoder(model), call_shape).window_sums(masks, windows)
    plain = [plain_score(model, mask, windows).window_sums for mask in masks]
    torch.testing.assert_close(sums, torch.tensor(plain, dtype=torch.float64), rtol=1e-13, atol=0)


def test_scores_match_a_forward_written_by_hand() -> None:
    """Independent of the pruned model classes: the residual stream as the paper draws it."""
    model = MODELS["grouped heads"]
    windows = random_windows(num_windows=1)
    mask = Mask.parse("mha.0+mlp.0+mlp.1+mha.3")
    with torch.inference_mode():
        stream = model.model.embed_tokens(windows)
        positions = torch.arange(windows.shape[1])[None]
        rotary = model.model.rotary_emb(stream, positions)
        for index, layer in enumerate(model.model.layers):
            if mask.keeps(Kind.MHA, index):
                normed = layer.input_layernorm(stream)
                stream = stream + layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
            if mask.keeps(Kind.MLP, index):
                stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        logits = model.lm_head(model.model.norm(stream))
        by_hand = token_nll(logits[:, :-1], windows[:, 1:]).sum()
    forked = ForkedPass(Decoder(model), CALL_SHAPE).window_sums([mask], windows)[0, 0]
    assert forked.item() == pytest.approx(by_hand.item(), rel=1e-13)


def test_every_candidate_of_a_step_scores_exactly_as_alone() -> None:
    model = MODELS["biases"]
    windows = random_windows()
    masks = [Mask().without(block) for block in Granularity.MIX.candidates(4)]
    forked = ForkedPass(Decoder(model), CALL_SHAPE)
    together = forked.window_sums(masks, windows)
    alone = torch.cat([forked.window_sums([mask], windows) for mask in masks])
    assert torch.equal(together, alone)


def test_an_error_inside_a_sweep_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    decoder = Decoder(model)
    windows = random_windows()
    before = model(input_ids=windows).logits
    out_of_vocabulary = windows.clone()
    out_of_vocabulary[0, -1] = 10_000
    with pytest.raises(IndexError):
        ForkedPass(decoder, CALL_SHAPE).window_sums([Mask.parse("mha.1")], out_of_vocabulary)
    with pytest.raises(RuntimeError, match="stop"), decoder.selective():
        raise RuntimeError("stop")
    assert torch.equal(model(input_ids=windows).logits, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_half_precision_losses_are_computed_in_float32() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.arange(5)
    nll = token_nll(logits, targets)
    exact = -torch.log_softmax(logits.double(), dim=-1)[torch.arange(5), targets]
    assert nll.dtype is torch.float32
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=1e-6)


class HostWaits(TorchDispatchMode):
    """Notes operations that a GPU would have to finish first: their values go to the host."""

    WAITS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.where: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in self.WAITS:
            ours = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.where.append(Path(ours[-2].filename).name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("metric", [kind() for kind in Metric.all().values()], ids=Metric.all())
def test_nothing_in_a_sweep_waits_for_a_device(metric: Metric) -> None:
    decoder, windows = Decoder(tiny_llama()), random_windows()
    masks = [Mask().without(block) for block in Granularity.MIX.candidates(4)]
    forked = ForkedPass(decoder, CallShape(sequences_per_call=6, tokens_per_head_call=30))
    forked.window_sums(masks, windows, metric)  # the dense streams that divergences need are made once
    with HostWaits() as waits:
        forked.window_sums(masks, windows, metric)
    assert waits.where == []
