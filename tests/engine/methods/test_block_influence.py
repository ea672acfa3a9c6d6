"""Block influence and relative magnitude against streams that hooks see in the model's own forward."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.model.decoder import Decoder
from tests.conftest import random_windows, tiny_llama
from tests.engine.architectures import NUM_LAYERS, ROWS

Stream = np.ndarray[Any, np.dtype[np.float64]]


def streams_of(
    model: PreTrainedModel, modules: dict[str, nn.Module], windows: Tensor
) -> dict[str, tuple[Stream, Stream]]:
    """What enters and leaves each module in plain forwards, one window at a time: float64 [W, T, H]."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            stream = output[0] if isinstance(output, tuple) else output
            # Copies: Falcon adds into what its MLP gives.
            seen[name].append((hidden[0].clone(), stream.view(hidden.shape)[0].clone()))

        return record

    hooks = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
    with torch.inference_mode():
        for window in windows:
            model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        name: (np.stack([x.numpy() for x, _ in pairs]), np.stack([y.numpy() for _, y in pairs]))
        for name, pairs in seen.items()
    }


def bi(x: Stream, y: Stream) -> float:
    cosines = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return float(1 - cosines.mean())


def magnitude(x: Stream, y: Stream) -> float:
    return float((np.linalg.norm(y - x, axis=-1) / np.linalg.norm(y, axis=-1)).mean())


def test_blocks_and_layers_of_a_llama_are_measured_by_the_streams_before_and_after_them() -> None:
    model, windows = tiny_llama(num_hidden_layers=2), random_windows()
    found = measure_influence(Decoder(model), windows)
    layers = model.model.layers
    modules = {f"{part}.{index}": layer for index, layer in enumerate(layers) for part in ("layer",)}
    modules |= {f"mha.{index}": layer.self_attn for index, layer in enumerate(layers)}
    seen = streams_of(model, modules, windows)
    for index in range(2):
        x, y = seen[f"layer.{index}"]
        middle = x + seen[f"mha.{index}"][1]
        for kind, ends in ((Kind.MHA, (x, middle)), (Kind.MLP, (middle, y)), (Kind.LAYER, (x, y))):
            assert found.block_influence[Block(kind, index)] == pytest.approx(bi(*ends), rel=1e-9)
            assert found.relative_magnitude[Block(kind, index)] == pytest.approx(magnitude(*ends), rel=1e-9)


def test_the_last_layer_is_measured_before_the_final_norm() -> None:
    model, windows = tiny_llama(num_hidden_layers=2), random_windows(num_windows=1)
    model.model.norm.weight.data.uniform_(0.1, 3)
    with torch.inference_mode():
        states = model(input_ids=windows, output_hidden_states=True, use_cache=False).hidden_states
    found = measure_influence(Decoder(model), windows).block_influence
    assert found[Block(Kind.LAYER, 0)] == pytest.approx(bi(states[0].numpy(), states[1].numpy()), rel=1e-9)
    assert found[Block(Kind.LAYER, 1)] != pytest.approx(bi(states[1].numpy(), states[2].numpy()), rel=1e-2)


@pytest.mark.parametrize("name", ["gpt_neox parallel", "falcon parallel", "falcon two norms", "cohere"])
def test_parallel_blocks_are_measured_by_what_each_alone_adds(name: str) -> None:
    model, windows = ROWS[name].model(), random_windows() % 120
    decoder = Decoder(model)
    found = measure_influence(decoder, windows).block_influence
    modules: dict[str, nn.Module] = {}
    for index, layer in enumerate(decoder.layers):
        modules[f"layer.{index}"] = layer
        modules[f"mha.{index}"] = layer.get_submodule(decoder.architecture.mixers[0])
        modules[f"mlp.{index}"] = layer.get_submodule(decoder.architecture.mlps[0])
    seen = streams_of(model, modules, windows)
    for index in range(NUM_LAYERS):
        x, y = seen[f"layer.{index}"]
        assert found[Block(Kind.LAYER, index)] == pytest.approx(bi(x, y), rel=1e-9)
        for kind in (Kind.MHA, Kind.MLP):
            alone = x + seen[f"{kind}.{index}"][1]
            assert found[Block(kind, index)] == pytest.approx(bi(x, alone), rel=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_layers_of_every_architecture_are_measured(name: str) -> None:
    model, windows = ROWS[name].model(), random_windows() % 120
    done = []
    decoder = Decoder(model)
    found = measure_influence(decoder, windows, lambda: done.append(1)).block_influence
    modules = {f"layer.{index}": layer for index, layer in enumerate(decoder.layers)}
    seen = streams_of(model, modules, windows)
    assert len(done) == len(windows)
    assert len(found) == 3 * NUM_LAYERS
    for index in range(NUM_LAYERS):
        x, y = (stream.astype(np.float64) for stream in seen[f"layer.{index}"])
        assert found[Block(Kind.LAYER, index)] == pytest.approx(bi(x, y), rel=1e-4)


def test_a_block_that_adds_nothing_has_no_influence() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    found = measure_influence(Decoder(model), random_windows())
    assert found.block_influence[Block(Kind.MHA, 1)] == pytest.approx(0, abs=1e-12)
    assert found.relative_magnitude[Block(Kind.MHA, 1)] == 0
    mlp, layer = Block(Kind.MLP, 1), Block(Kind.LAYER, 1)
    assert found.block_influence[mlp] == pytest.approx(found.block_influence[layer])
