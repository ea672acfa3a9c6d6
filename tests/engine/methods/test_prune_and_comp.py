"""Prune&Comp against a plain loop over whole copies that scales the embedding and all earlier projections."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.prune_and_comp import prune_and_comp
from blockpruner.engine.model.decoder import Decoder
from tests.conftest import random_windows, tiny_llama
from tests.engine.architectures import ROWS

WINDOWS = random_windows(6, 16)


def hidden_states(model: PreTrainedModel) -> list[torch.Tensor]:
    """The stream before each layer and after the last, without the final norm."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        for layer in model.model.layers
    ]
    handles.append(model.model.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out.detach())))
    model(input_ids=WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def plain_loop(model: PreTrainedModel, num_remove: int) -> tuple[PreTrainedModel, list[int], list[float]]:
    model, left = copy.deepcopy(model), list(range(len(model.model.layers)))
    removed, factors = [], []
    for _ in range(num_remove):
        streams = hidden_states(model)
        turned = [float((1 - torch.cosine_similarity(s, t, dim=-1)).mean()) for s, t in pairwise(streams)]
        place = turned.index(min(turned))
        s, t = streams[place], streams[place + 1]
        factor = float((t.abs().mean(1) / s.abs().mean(1)).mean())
        model.model.embed_tokens.weight.mul_(factor)
        for layer in model.model.layers[:place]:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
        del model.model.layers[place]
        removed.append(left.pop(place))
        factors.append(factor)
    return model, removed, factors


def test_layers_factors_and_logits_are_those_of_the_plain_loop() -> None:
    model = tiny_llama(num_hidden_layers=6, rms_norm_eps=1e-14)
    expected, removed, factors = plain_loop(model, 3)
    found = prune_and_comp(Decoder(model), WINDOWS, num_remove=3)
    assert found.removed == removed
    assert found.factors == pytest.approx(factors, rel=1e-6)
    with torch.no_grad():
        ours, theirs = (one(input_ids=WINDOWS, use_cache=False).logits for one in (found.model, expected))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # norms compute in float32


def test_a_block_with_a_norm_after_it_is_refused() -> None:
    with pytest.raises(UserError, match="a norm follows its output projection"):
        prune_and_comp(Decoder(ROWS["gemma2"].model().double()), WINDOWS % 40, num_remove=1)
