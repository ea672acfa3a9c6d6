"""Pruned models: nothing of the removed blocks is left, and the rest behaves as it must with and without caches."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.checkpoint.older import add_older_keys
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_tokenizer
from blockpruner.engine.model.surgery import check_cache, group_blocks, keep_layers, prune
from blockpruner.engine.score import Score, perplexity
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.sections import ModelSource
from tests.conftest import generate, load, random_windows, tiny_llama, tiny_tokenizer
from tests.engine.architectures import ROWS

MASKS = [
    "mha.0",
    "mlp.0",
    "mha.0+mlp.0",
    "mha.0+mha.1+mlp.2",
    "mha.1+mlp.1+mha.3",
    "mha.0+mha.1+mha.2",
    "mlp.0+mlp.1+mlp.2+mlp.3",
    "mha.0+mlp.0+mha.3+mlp.3",
]
single = st.builds(Block, st.sampled_from([Kind.MHA, Kind.MLP]), st.integers(0, 5))


@given(st.builds(Mask, st.frozensets(single)))
def test_groups_hold_every_kept_block_once_and_in_order(mask: Mask) -> None:
    kept = [(k, n) for n in range(6) for k in (Kind.MHA, Kind.MLP) if mask.keeps(k, n)]
    if not any(kind is Kind.MHA for kind, _ in kept):
        with pytest.raises(UserError, match="at least one of the 6 attention blocks"):
            group_blocks(mask, 6)
        return
    order = []
    for group in group_blocks(mask, 6):
        order += [(Kind.MLP, layer) for layer in group["pre"]]
        order.append((Kind.MHA, group["attention"]))
        order += [(Kind.MLP, group["attention"])] if group["mlp"] else []
        order += [(Kind.MLP, layer) for layer in group["post"]]
    assert order == kept


@pytest.mark.parametrize("text", MASKS)
def test_removed_parameters_are_gone_and_the_dense_model_is_untouched(text: str) -> None:
    dense, mask = tiny_llama(tie_word_embeddings=True), Mask.parse(text)
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    shape = Decoder(dense).shape
    pruned = prune(dense, mask)
    removed = shape.num_removed(mask)
    assert sum(weight.numel() for weight in pruned.parameters()) == shape.num_parameters - removed
    assert shape.ratio(mask) == pytest.approx(removed / shape.num_parameters)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert pruned.model.embed_tokens.weight.data_ptr() == dense.model.embed_tokens.weight.data_ptr()
    assert all(torch.equal(before[name], weight) for name, weight in dense.state_dict().items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", MASKS)
def test_generation_with_any_cache_equals_generation_without(text: str, attention: str) -> None:
    dense = tiny_llama()
    dense.set_attn_implementation(attention)
    pruned = prune(dense, Mask.parse(text))
    plain = generate(pruned, use_cache=False)
    assert generate(pruned) == plain
    assert generate(pruned, cache_implementation="static") == plain


@pytest.mark.parametrize("text", MASKS)
def test_prefill_in_chunks_equals_one_forward(text: str) -> None:
    pruned = prune(tiny_llama(), Mask.parse(text))
    ids = random_windows(num_windows=2, seq_len=12)
    with torch.inference_mode():
        whole = pruned(input_ids=ids, use_cache=False).logits
        first = pruned(input_ids=ids[:, :5], use_cache=True)
        second = pruned(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole)


def test_hidden_states_are_one_for_each_layer_that_is_left() -> None:
    pruned = prune(tiny_llama(), Mask.parse("mha.0+mha.2+mlp.3"))
    output = pruned(input_ids=random_windows(), output_hidden_states=True)
    assert len(output.hidden_states) == pruned.config.num_hidden_layers + 1 == 3


@pytest.mark.parametrize("text", ["mha.4", "mlp.9+mha.1"])
def test_a_mask_for_a_deeper_model_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="4 layers"):
        prune(tiny_llama(), Mask.parse(text))


def save(folder: Path, mask: Mask, **overrides: object) -> PreTrainedModel:
    pruned = prune(tiny_llama(torch.float32, **overrides), mask)
    folder.mkdir()
    write_grouped(pruned, tiny_tokenizer(), {"format": "grouped", "removed": []}, folder)
    return pruned


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_changes_nothing(tmp_path: Path, text: str, tied: bool) -> None:
    pruned = save(tmp_path / "one", Mask.parse(text), tie_word_embeddings=tied)
    loaded = load(tmp_path / "one", "float32")
    ids = random_windows()
    assert torch.equal(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert generate(loaded) == generate(pruned, use_cache=False)
    loaded.save_pretrained(tmp_path / "two")
    add_older_keys(tmp_path / "two")  # transformers itself does not write them
    for name in ("model.safetensors", "config.json", "generation_config.json", "modeling_blockpruned_llama.py"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_checkpoint_holds_the_kept_tensors_the_tokenizer_and_where_it_came_from(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = tmp_path / "model"
    save(folder, Mask.parse("mha.0+mlp.1+mha.2+mlp.2"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        layers = sorted({".".join(name.split(".")[2:-2]) for name in file.keys() if "layers" in name})  # noqa: SIM118
    assert "0.pre.0.mlp" in layers
    assert "0.mlp" not in layers
    assert not any(name.startswith("2.") for name in layers)
    assert load_tokenizer(ModelSource(str(folder)))("the fox")["input_ids"] == tiny_tokenizer()("the fox")["input_ids"]
    assert json.loads((folder / "blockpruner.json").read_text()) == {"format": "grouped", "removed": []}


def test_the_folder_loads_where_this_project_is_not_installed(tmp_path: Path) -> None:
    """In another process whose path has neither `engine` nor `cluster`, through the modelling file in the folder."""
    folder = tmp_path / "model"
    pruned = save(folder, Mask.parse("mha.0+mlp.1+mha.2"))
    ids = random_windows()
    script = f"""
import json, sys, torch
sys.meta_path.insert(0, type("Block", (), {{"find_spec": staticmethod(
    lambda name, path=None, target=None: (_ for _ in ()).throw(ImportError(name))
    if name.split(".")[0] == "blockpruner" else None)}}))
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
with torch.inference_mode():
    logits = model(input_ids=torch.tensor({ids.tolist()})).logits
model.save_pretrained({str(tmp_path / "again")!r})
print(json.dumps([type(model).__module__.split(".")[0], logits.double().sum().item()]))
"""
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    module, total = json.loads(done.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    assert total == pytest.approx(pruned(input_ids=ids).logits.double().sum().item(), rel=1e-9)
    for file in ("model.safetensors", "modeling_blockpruned_llama.py"):  # what it saves is as complete
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_a_saved_models_perplexity_is_the_searchs(tmp_path: Path) -> None:
    mask, windows = Mask.parse("mha.0+mlp.1+mha.2"), random_windows()
    save(tmp_path / "model", mask)
    forked = ForkedPass(Decoder(tiny_llama(torch.float32)), CallShape(sequences_per_call=4, tokens_per_head_call=64))
    sums = forked.window_sums([mask], windows)[0]
    searched = perplexity(Score(mask, tuple(sums.tolist()), windows.shape[1] - 1).value)
    found = evaluate_perplexity(load(tmp_path / "model", "float32"), windows)
    assert found.value == pytest.approx(searched, rel=1e-6)
    assert found.num_windows == 3
    assert found.stderr is not None


def test_perplexity_of_a_single_window_has_no_standard_error() -> None:
    assert evaluate_perplexity(tiny_llama(), random_windows(num_windows=1)).stderr is None


def test_per_layer_lists_are_cut_to_the_layers_that_others_were_merged_into() -> None:
    model = ROWS["qwen2 sliding"].model()
    before = model.config.layer_types
    kept = keep_layers(model, [1, 3])
    assert kept.config.layer_types == [before[1], before[3]] != before
    assert [layer.self_attn.layer_idx for layer in kept.model.layers] == [0, 1]


def test_a_model_whose_config_says_by_the_place_what_a_layer_holds_is_not_cut_anyhow() -> None:
    with pytest.raises(UserError, match="'qwen3_moe': with 2 layers it has a different 'model"):
        keep_layers(ROWS["qwen3_moe"].model(), [1, 3])


def test_a_model_whose_dynamic_frequencies_have_grown_is_pruned_with_its_length() -> None:
    """Dynamic RoPE keeps the frequencies of the longest text so far until a short one comes."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dense = tiny_llama(torch.float32, rope_parameters=rope, max_position_embeddings=8)
    short, long = random_windows(num_windows=1, seq_len=6), random_windows(num_windows=1, seq_len=24)

    @torch.inference_mode()
    def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    mask = Mask.parse("mha.1+mlp.2")
    expected = logits(prune(dense, mask), short)
    for before in ([long], [long, short]):  # grown, and reset
        for ids in before:
            logits(dense, ids)
        assert torch.equal(logits(prune(dense, mask), short), expected)


class _Cached:
    """A model whose logits with a cache differ from those without in the last three of eight places."""

    def __init__(self, dtype: torch.dtype, error: float, *, is_shifted: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        self.logits = torch.randn(1, 8, 500, generator=draw, dtype=torch.float64)
        self.cached = self.logits + error * torch.randn(1, 8, 500, generator=draw, dtype=torch.float64)
        if is_shifted:
            self.cached = self.logits.roll(1, dims=1)
        self.dtype, self.device = dtype, torch.device("cpu")
        self.first = 500
        self.config = SimpleNamespace(vocab_size=500, model_type="blockpruned_made_up")

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: int = 0) -> CausalLMOutputWithPast:
        self.first = min(self.first, int(input_ids.min()))
        stop = past_key_values + input_ids.shape[1]
        logits = self.cached if past_key_values else self.logits
        return CausalLMOutputWithPast(logits=logits[:, past_key_values:stop].to(self.dtype), past_key_values=stop)


def test_rounding_in_half_precision_is_no_wrong_cache() -> None:
    check_cache(_Cached(torch.bfloat16, error=0.13))
    check_cache(_Cached(torch.float32, error=1e-3))
    with pytest.raises(UserError, match="different logits with and without a KV cache"):
        check_cache(_Cached(torch.float32, error=0.13))


def test_a_cache_is_not_judged_by_special_tokens_on_which_rounding_can_change_everything() -> None:
    model = _Cached(torch.bfloat16, error=0.0)
    check_cache(model)
    assert model.first >= 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cache_that_is_one_token_late_is_refused_in_every_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match="different logits with and without a KV cache"):
        check_cache(_Cached(dtype, error=0.0, is_shifted=True))
