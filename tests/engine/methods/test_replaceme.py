"""ReplaceMe against numpy's least squares and a plain walk through the model's own layers."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.replaceme import replaceme
from blockpruner.engine.model.decoder import Decoder
from tests.conftest import TINY, random_windows, tiny_llama
from tests.engine.architectures import ROWS

WINDOWS = random_windows(12, 16)


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=TINY["vocab_size"], n_embd=32, n_layer=5, n_head=4, initializer_range=0.2)
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {
    "llama": (lambda: tiny_llama(num_hidden_layers=5), "model.layers", "mlp.down_proj"),
    "gpt2": (tiny_gpt2, "transformer.h", "mlp.c_proj"),
}


def streams_and_outputs(model: PreTrainedModel, layers: str, projection: str) -> tuple[list[Tensor], list[Tensor]]:
    """The stream before each layer and after the last, and the output of each MLP."""
    before: list[Tensor] = []
    outputs: list[Tensor] = []
    for layer in model.get_submodule(layers):
        layer.register_forward_pre_hook(lambda module, args: before.append(args[0]))
        layer.get_submodule(projection).register_forward_hook(lambda module, args, output: outputs.append(output))
    last = model.get_submodule(layers)[-1]
    ends: list[Tensor] = []
    last.register_forward_hook(lambda module, args, out: ends.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    return [*before, *ends], outputs


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("num_remove", [1, 2])
def test_the_run_and_the_map_are_those_of_numpy(kind: str, num_remove: int) -> None:
    make, layers, projection = MODELS[kind]
    model = make()
    found = replaceme(Decoder(make()), WINDOWS, num_remove=num_remove)
    streams, outputs = streams_and_outputs(model, layers, projection)
    distances = {
        first: float((1 - torch.cosine_similarity(streams[first], streams[first + num_remove], dim=-1)).mean())
        for first in range(1, 5 - num_remove + 1)
    }
    first = min(distances, key=distances.__getitem__)
    assert found.layers == [layer for layer in range(5) if not first <= layer < first + num_remove]
    assert found.distance == pytest.approx(distances[first], rel=1e-9)

    seen = outputs[first - 1], streams[first], streams[first + num_remove]
    m, s, t = (part.reshape(-1, 32).numpy() for part in seen)
    linear = np.linalg.lstsq(m, t - s + m, rcond=None)[0]
    expected = s - m + m @ linear
    after, _ = streams_and_outputs(copy.deepcopy(found.model), layers, projection)
    assert np.abs(after[first].reshape(-1, 32).numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    assert np.abs(expected - t).max() < np.abs(s - t).max(), "the map brings the stream nearer"


def test_the_dense_model_stays_as_it_is() -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    replaceme(Decoder(model), WINDOWS, num_remove=1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_mlp_with_a_norm_after_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"of mlp\.\d does not: a norm follows its output projection"):
        replaceme(Decoder(ROWS["gemma2"].model().double()), WINDOWS % 40, num_remove=1)
