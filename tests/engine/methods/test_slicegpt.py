"""SliceGPT against the dense model: unsliced, and with its streams projected by hooks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.slicegpt import (
    num_parameters_at,
    principal_axes,
    ratio_at,
    slicegpt,
    sparsity_for_ratio,
    width_of,
)
from tests.conftest import generate, load, random_windows, tiny_llama, tiny_tokenizer
from tests.engine.architectures import ROWS

SLICEABLE = [
    "llama",
    "llama tied",
    "llama biased",
    "mistral sliding",
    "qwen2",
    "qwen2 sliding",
    "qwen3",
]


def windows_for(name: str) -> Tensor:
    return random_windows(num_windows=4) % ROWS[name].make_config().vocab_size


def number_of(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorms compute in float32 even in float64 models, which hides errors below 1e-6."""

    def forward(norm: Any, hidden: Tensor) -> Tensor:
        return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    for name in SLICEABLE:
        monkeypatch.setattr(type(ROWS[name].model().model.norm), "forward", forward)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", SLICEABLE)
def test_without_slicing_the_model_is_the_dense_one(name: str) -> None:
    model, windows = ROWS[name].model(), windows_for(name)
    sliced = slicegpt(model, windows, sparsity=0).model
    with torch.inference_mode():
        torch.testing.assert_close(sliced(windows).logits, model(windows).logits, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", ["llama biased", "qwen2", "qwen3"])
def test_a_sliced_model_is_the_dense_one_with_its_streams_projected_on_their_principal_axes(name: str) -> None:
    """The method again in the dense model's axes, with numpy's SVD of the signals."""
    model, windows, width = ROWS[name].model(), windows_for(name), 24
    sliced = slicegpt(model, windows, sparsity=0.25).model

    def projected(stream: Tensor, norm: Any) -> Tensor:
        x = stream.flatten(0, 1).numpy()
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.variance_epsilon)
        axes = torch.from_numpy(np.linalg.svd(x)[2][:width].T.copy())
        return stream @ axes @ axes.T

    calls: list[tuple[Tensor, dict[str, Any]]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(windows, use_cache=False)
        stream = calls[0][0]
        for layer, (_, keywords) in zip(model.model.layers, calls, strict=True):
            stream = projected(stream, layer.input_layernorm)
            stream = stream + layer.self_attn(hidden_states=layer.input_layernorm(stream), **keywords)[0]
            stream = projected(stream, layer.post_attention_layernorm)
            stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        expected = model.lm_head(model.model.norm(stream))
        torch.testing.assert_close(sliced(windows).logits, expected, rtol=1e-9, atol=1e-9)


def test_principal_axes_are_the_directions_that_a_signal_was_made_of() -> None:
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    scales = np.array([0.1, 5.0, 0.5, 3.0, 0.01, 1.0])
    signal = np.linalg.qr(generator.normal(size=(50, 6)))[0] * scales @ directions.T
    axes = principal_axes(torch.from_numpy(signal.T @ signal)).numpy()
    cosines = np.abs(axes.T @ directions)
    np.testing.assert_allclose(cosines, np.eye(6)[np.argsort(-scales)], atol=1e-6)


@pytest.mark.parametrize("name", SLICEABLE)
def test_a_sliced_checkpoint_loads_with_the_same_bits_and_has_the_parameters_that_were_forecast(
    name: str, tmp_path: Path
) -> None:
    model, windows = ROWS[name].model().float(), windows_for(name)
    num_dense = number_of(model)
    sliced = slicegpt(model, windows, sparsity=0.25)
    assert sliced.width == 24
    assert number_of(sliced.model) == num_parameters_at(model, 24)
    assert ratio_at(model, 24) == 1 - number_of(sliced.model) / num_dense
    assert number_of(model) == num_dense
    write_grouped(sliced.model, tiny_tokenizer(), {}, tmp_path)
    loaded = load(tmp_path)
    with torch.inference_mode():
        logits = sliced.model(windows).logits
        assert logits.isfinite().all()
        assert torch.equal(loaded(windows).logits, logits)
    assert loaded.config.model_type == f"sliced_{model.config.model_type}"
    assert not loaded.config.tie_word_embeddings


def test_slicing_twice_gives_the_same_bits() -> None:
    first, second = (slicegpt(tiny_llama(), random_windows(), sparsity=0.25).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["llama", "qwen2 sliding", "mistral sliding"])
def test_a_sliced_model_generates_with_a_cache_as_without(name: str) -> None:
    model = slicegpt(ROWS[name].model(), windows_for(name), sparsity=0.25).model
    assert generate(model) == generate(model, use_cache=False)


def test_the_folder_loads_where_this_project_is_not_installed(tmp_path: Path) -> None:
    sliced = slicegpt(tiny_llama(torch.float32), random_windows(), sparsity=0.25).model
    write_grouped(sliced, None, {}, tmp_path / "sliced")
    torch.save(sliced(random_windows()).logits, tmp_path / "logits.pt")
    torch.save(random_windows(), tmp_path / "windows.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('sliced', trust_remote_code=True)\n"
        "assert 'blockpruner' not in sys.modules\n"
        "logits = model(torch.load('windows.pt')).logits\n"
        "assert torch.equal(logits, torch.load('logits.pt'))\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)


def test_one_call_for_each_layer_tells_the_progress() -> None:
    done: list[int] = []
    slicegpt(tiny_llama(), random_windows(), sparsity=0.25, on_layer=lambda: done.append(1))
    assert len(done) == 4


@pytest.mark.parametrize(
    ("sparsity", "hidden_size", "width"), [(0, 576, 576), (0.25, 4096, 3072), (0.3, 4096, 2864), (0.3, 80, 56)]
)
def test_widths_are_rounded_down_to_multiples_of_eight(sparsity: float, hidden_size: int, width: int) -> None:
    assert width_of(sparsity, hidden_size) == width
    assert width_of(1 - width / hidden_size, hidden_size) == width


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 0.99, float("nan")])
def test_a_sparsity_that_leaves_nothing_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match="expected a sparsity of at least 0 that leaves 8 or more of 32 axes"):
        width_of(sparsity, 32)


def test_the_sparsity_for_a_ratio_is_the_nearest_that_there_is_and_needs_no_weights() -> None:
    with torch.device("meta"):
        model = tiny_llama(torch.float32, hidden_size=64, tie_word_embeddings=True)
    ratios = {width: ratio_at(model, width) for width in range(8, 65, 8)}
    assert min(ratios.values()) < 0  # the head that was tied now counts
    for wanted in (-1.0, 0.0, 0.1, 0.2, 0.3, 0.6, 1.0):
        width = width_of(sparsity_for_ratio(model, wanted), 64)
        assert abs(ratios[width] - wanted) == min(abs(ratio - wanted) for ratio in ratios.values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "'gpt2': its LayerNorms subtract the mean"),
        ("gpt_neox parallel", "'gpt_neox': its LayerNorms"),
        ("gemma2", "'gemma2': it has norms after its blocks"),
        ("cohere", "'cohere': its attention and its MLP do not each read the stream through their own norm"),
        ("granite", "'granite': its layers are not known to have the structure of Llama's"),
        ("olmo2", "'olmo2': it has norms after its blocks"),
    ],
)
def test_architectures_that_are_not_sliced_are_refused_with_the_reason(name: str, reason: str) -> None:
    for attempt in (
        lambda model: slicegpt(model, windows_for(name), sparsity=0.25),
        lambda model: sparsity_for_ratio(model, 0.2),
    ):
        with pytest.raises(UserError, match=reason):
            attempt(ROWS[name].model())
