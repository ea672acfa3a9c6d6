"""ShortGPT, Relative Magnitude and their block-level forms against plain loops."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.methods.ranking import Measured, rank
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from tests.conftest import random_windows, tiny_llama


def order(
    decoder: Decoder, windows: Tensor, blocks: Granularity, num_remove: int, statistic: str, *, again: bool = False
) -> list[Block]:
    """statistic: a field of Influence."""

    def measure(mask: Mask) -> Measured:
        found = measure_influence(decoder, windows, mask=mask, layers_only=blocks is Granularity.LAYER)
        return Measured(getattr(found, statistic), found.work_flops)

    space = SearchSpace(shape=decoder.shape, blocks=blocks, budget=Budget(num_remove=num_remove))
    return [removal.block for removal in rank(space, statistic, measure, again=again)]


def test_shortgpt_orders_layers_as_a_plain_loop_over_hidden_states() -> None:
    model, windows = tiny_llama(num_hidden_layers=6), random_windows()
    model.model.norm = torch.nn.Identity()  # so that the last hidden state is raw, too
    decoder = Decoder(model)
    influence = []
    with torch.inference_mode():
        states = [state.numpy() for state in model(windows, output_hidden_states=True).hidden_states]
    for x, y in pairwise(states):
        cosines = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
        influence.append(1 - cosines.mean())
    expected = [Block(Kind.LAYER, int(layer)) for layer in np.argsort(influence)][:4]
    assert order(decoder, windows, Granularity.LAYER, 4, "block_influence") == expected


def test_relative_magnitude_has_an_order_of_its_own() -> None:
    model, windows = tiny_llama(num_hidden_layers=6), random_windows()
    decoder = Decoder(model)
    with torch.inference_mode():
        model.model.norm = torch.nn.Identity()
        states = [state.numpy() for state in model(windows, output_hidden_states=True).hidden_states]
    changes = [(np.linalg.norm(y - x, axis=-1) / np.linalg.norm(y, axis=-1)).mean() for x, y in pairwise(states)]
    expected = [Block(Kind.LAYER, int(layer)) for layer in np.argsort(changes)][:5]
    assert order(decoder, windows, Granularity.LAYER, 5, "relative_magnitude") == expected


@pytest.mark.parametrize("statistic", ["block_influence", "relative_magnitude"])
def test_measured_again_each_removal_is_the_lowest_of_the_model_without_the_earlier_ones(statistic: str) -> None:
    model, windows = tiny_llama(), random_windows()
    decoder = Decoder(model)
    removed = order(decoder, windows, Granularity.MIX, 5, statistic, again=True)
    for step, block in enumerate(removed):
        mask = Mask.of(removed[:step])
        values = getattr(measure_influence(decoder, windows, mask=mask), statistic)
        single = {each: value for each, value in values.items() if each.kind is not Kind.LAYER}
        assert set(single) == {b for b in Granularity.MIX.candidates(4) if b not in mask.absent}
        assert block == min(single, key=lambda each: single[each])


def test_influence_under_a_mask_is_that_of_the_pruned_model() -> None:
    model, windows = tiny_llama(), random_windows()
    mask = Mask.parse("mha.0+mlp.1+mha.2+mlp.2")
    found = measure_influence(Decoder(model), windows, mask=mask).block_influence
    assert Block(Kind.LAYER, 2) not in found
    pruned = prune(model, mask)
    seen = []
    for layer in (pruned.model.layers[0], pruned.model.layers[-1]):
        layer.register_forward_hook(
            lambda _, args, kwargs, output: seen.append((args[0].clone(), output.clone())), with_kwargs=True
        )
    with torch.inference_mode():
        for window in windows:
            pruned(window[None], use_cache=False)
    x, y = (torch.cat(streams) for streams in zip(*seen[1::2], strict=True))
    expected = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean().item()
    assert found[Block(Kind.LAYER, 3)] == pytest.approx(expected, rel=1e-9)


def test_layers_alone_are_measured_as_beside_their_blocks() -> None:
    decoder, windows = Decoder(tiny_llama()), random_windows()
    whole, layers = (measure_influence(decoder, windows, layers_only=only) for only in (False, True))
    assert layers.block_influence == {b: v for b, v in whole.block_influence.items() if b.kind is Kind.LAYER}
    assert layers.relative_magnitude == {b: v for b, v in whole.relative_magnitude.items() if b.kind is Kind.LAYER}


def test_one_attention_stays_whatever_the_order_says() -> None:
    model = tiny_llama()
    for layer in model.model.layers:  # attentions that hardly change the stream would all go first
        layer.self_attn.o_proj.weight.data *= 1e-3
    decoder, windows = Decoder(model), random_windows()
    removed = order(decoder, windows, Granularity.MIX, 6, "block_influence")
    assert [block.kind for block in removed] == [Kind.MHA] * 3 + [Kind.MLP] * 3
