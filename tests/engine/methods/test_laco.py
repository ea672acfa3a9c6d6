"""LaCo against the formula in numpy and a plain loop over whole copies."""

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, LlamaModel, PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.laco import Collapse, Merged, _Collapser, laco
from tests.conftest import generate, random_windows, tiny_llama
from tests.engine.architectures import NUM_LAYERS, ROWS

UNEQUAL = ("qwen3_moe", "llama4", "gemma4")


def laco_at(
    model: PreTrainedModel, sentences: Iterable[Tensor], *, threshold: float, collapse: Collapse | None = None
) -> Merged:
    """The paper's loop at a given threshold T."""
    return _Collapser(model, sentences, collapse or Collapse(), lambda: None).merged(threshold)


def calm_llama(num_layers: int = 8, seed: int = 0) -> PreTrainedModel:
    """Layers that turn the stream a little each: some merges pass, some do not."""
    model = tiny_llama(num_hidden_layers=num_layers, seed=seed, initializer_range=0.05)
    model.model.embed_tokens.weight.data.mul_(10)
    with torch.no_grad():
        for parameter in model.parameters():  # norms must not be trivial
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def sentences(num_sentences: int = 3) -> list[Tensor]:
    """Of different lengths."""
    return [ids[: 5 + 4 * index] for index, ids in enumerate(random_windows(num_sentences))]


def plain_loop(
    model: PreTrainedModel, texts: list[Tensor], threshold: float, c: int, low: int, high: int, interval: int
) -> tuple[PreTrainedModel, list[list[int]]]:
    """The algorithm as the paper writes it and the notebooks walk it, with a copy of the model for each candidate."""
    current, sources = copy.deepcopy(model), [[index] for index in range(len(model.model.layers))]
    base = high - c
    while base >= low:
        candidate = copy.deepcopy(current)
        layers = candidate.model.layers
        num_more = min(c - 1, len(layers) - base - 1)
        theta = {name: weight.clone() for name, weight in layers[base].named_parameters()}
        with torch.no_grad():
            for k in range(1, num_more + 1):
                for name, weight in layers[base].named_parameters():
                    weight += dict(layers[base + k].named_parameters())[name] - theta[name]
        del layers[base + 1 : base + 1 + num_more]
        candidate.config.num_hidden_layers = len(layers)
        cosines = []
        with torch.no_grad():
            for text in texts:
                states = [
                    each(input_ids=text[None], output_hidden_states=True, use_cache=False).hidden_states[-1]
                    for each in (model, candidate)
                ]
                cosines.append(F.cosine_similarity(states[0].flatten(), states[1].flatten(), dim=0).item())
        if np.mean(cosines) > threshold:
            current = candidate
            sources[base : base + 1 + num_more] = [
                [index for part in sources[base : base + 1 + num_more] for index in part]
            ]
            base -= interval
            if base >= len(layers):
                base = len(layers) - 1 - c
        else:
            base -= 1
    return current, sources


@pytest.mark.parametrize("num_merged", [2, 3])
def test_merged_weights_are_the_papers_formula(num_merged: int) -> None:
    model = tiny_llama()
    merged = laco_at(
        model, sentences(), threshold=-1, collapse=Collapse(num_merged=num_merged, lowest=1, highest=1 + num_merged)
    )
    assert merged.layers == ((0,), tuple(range(1, 1 + num_merged)), *((i,) for i in range(1 + num_merged, 4)))
    theta = [
        {name: weight.detach().numpy() for name, weight in layer.named_parameters()} for layer in model.model.layers
    ]
    for name, weight in merged.model.model.layers[1].named_parameters():
        expected = theta[1][name] + sum(theta[1 + k][name] - theta[1][name] for k in range(1, num_merged))
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("c", "low", "high", "interval", "threshold", "num_removed"),
    [
        (2, 0, 8, 1, 0.97, 5),
        (2, 0, 8, 1, 0.985, 2),
        (3, 1, 8, 2, 0.9, 4),
        (3, 0, 8, 1, 0.95, 5),
        (4, 0, 7, 3, 0.7, 3),
    ],
)
def test_decisions_and_weights_are_those_of_a_plain_loop(
    c: int, low: int, high: int, interval: int, threshold: float, num_removed: int
) -> None:
    model = calm_llama()
    expected, sources = plain_loop(model, sentences(), threshold, c, low, high, interval)
    collapse = Collapse(num_merged=c, lowest=low, highest=high, interval=interval)
    found = laco_at(model, sentences(), threshold=threshold, collapse=collapse)
    assert [list(layer) for layer in found.layers] == sources
    assert found.num_removed == num_removed
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=1e-10, atol=1e-12)


def test_merging_as_in_the_published_code_takes_the_last_layers_weights_and_the_first_ones_norms() -> None:
    model = tiny_llama(num_hidden_layers=6)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
    collapse = Collapse(num_merged=3, lowest=0, as_in_code=True)
    merged = laco_at(model, random_windows(), threshold=-1.0, collapse=collapse)
    for layer, sources in zip(merged.model.model.layers, merged.layers, strict=True):
        first, last = (model.model.layers[index] for index in (sources[0], sources[-1]))
        assert torch.equal(layer.input_layernorm.weight, first.input_layernorm.weight)
        assert torch.equal(layer.mlp.down_proj.weight, last.mlp.down_proj.weight)
        assert torch.equal(layer.self_attn.q_proj.weight, last.self_attn.q_proj.weight)
    assert max(map(len, merged.layers)) > 2


def test_the_search_reaches_the_number_that_is_nearest_of_all_thresholds() -> None:
    model, collapse = calm_llama(num_layers=5), Collapse(num_merged=2, lowest=0, interval=1)
    by_grid = [
        laco_at(model, sentences(), threshold=threshold, collapse=collapse) for threshold in np.linspace(0.96, 1, 9)
    ]
    reachable = {0, 4, *(merged.num_removed for merged in by_grid)}
    assert len(reachable) > 2
    for num_remove in range(1, 5):
        measured: list[int] = []
        forwards: list[int] = []
        counting = register_module_forward_hook(
            lambda module, *_, seen=forwards: seen.append(1) if isinstance(module, LlamaModel) else None
        )
        found = laco(
            model,
            sentences(),
            num_remove=num_remove,
            collapse=collapse,
            on_candidate=lambda measured=measured: measured.append(1),
        )
        counting.remove()
        assert len(forwards) == 3 * (1 + len(measured))
        assert abs(found.num_removed - num_remove) == min(abs(number - num_remove) for number in reachable)
        again = laco_at(model, sentences(), threshold=found.threshold, collapse=collapse)
        assert (found.layers, found.similarity) == (again.layers, again.similarity)


def test_the_dense_model_stays_and_shares_what_was_not_merged() -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = laco_at(model, sentences(), threshold=-1, collapse=Collapse(num_merged=2, lowest=2, interval=1)).model
    assert model.config.num_hidden_layers == 4
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for theirs, ours in ((model.model.embed_tokens, merged.model.embed_tokens), (model.lm_head, merged.lm_head)):
        assert theirs.weight.data_ptr() == ours.weight.data_ptr()
    assert model.model.layers[1].mlp.up_proj.weight.data_ptr() == merged.model.layers[1].mlp.up_proj.weight.data_ptr()


@pytest.mark.parametrize("name", [name for name in ROWS if name not in UNEQUAL])
def test_merged_models_of_every_architecture_load_as_stock_models(name: str, tmp_path: Path) -> None:
    model = ROWS[name].model().float()
    merged = laco_at(
        model, [ids % 120 for ids in sentences()], threshold=-1, collapse=Collapse(num_merged=3, lowest=0, interval=9)
    )
    assert merged.layers == ((0,), (1, 2, 3))
    merged.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    assert loaded.config.num_hidden_layers == 2 < NUM_LAYERS
    windows = random_windows() % 120
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=windows).logits, merged.model(input_ids=windows).logits)
        cached = merged.model(input_ids=windows[:, :9], use_cache=True)
        rest = merged.model(input_ids=windows[:, 9:], past_key_values=cached.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, merged.model(input_ids=windows).logits[:, 9:], rtol=1e-4, atol=1e-4)


def test_a_merged_model_generates_with_a_cache_as_without() -> None:
    model = laco_at(calm_llama(), sentences(), threshold=-1, collapse=Collapse(num_merged=3)).model
    assert generate(model) == generate(model, use_cache=False)


def test_a_layer_that_gives_no_finite_numbers_is_not_merged() -> None:
    model = calm_llama()
    model.model.layers[6].mlp.down_proj.weight.data.fill_(torch.inf)
    merged = laco_at(model, sentences(), threshold=-1, collapse=Collapse(num_merged=2, lowest=0))
    assert merged.num_removed == 0


def test_layers_of_different_shapes_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"expected layers of equal shapes .* 'qwen3_moe' .* in layer 0 and .* in layer 1"
    ):
        laco(ROWS[UNEQUAL[0]].model(), sentences(), num_remove=1)


@pytest.mark.parametrize(
    ("num_remove", "collapse", "message"),
    [
        (0, Collapse(num_merged=2), "between 1 and 3 layers .* got 0"),
        (4, Collapse(num_merged=2), "between 1 and 3 layers .* got 4"),
        (1, Collapse(num_merged=1), "between 2 and 4 layers at a time, got 1"),
        (1, Collapse(num_merged=5), "between 2 and 4 layers at a time, got 5"),
        (1, Collapse(num_merged=2, interval=0), "interval of at least 1, got 0"),
        (1, Collapse(num_merged=2, highest=5), "highest <= 4 .* got lowest 1 and highest 5"),
        (1, Collapse(num_merged=2, lowest=3), "lowest <= highest - 2 .* got lowest 3 and highest 4"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(num_remove: int, collapse: Collapse, message: str) -> None:
    with pytest.raises(UserError, match=message):
        laco(tiny_llama(), sentences(), num_remove=num_remove, collapse=collapse)


def test_no_sentences_are_refused() -> None:
    with pytest.raises(UserError, match="at least one sentence"):
        laco(tiny_llama(), [], num_remove=1, collapse=Collapse(num_merged=2))
