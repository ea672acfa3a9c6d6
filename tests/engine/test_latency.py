from pathlib import Path

import pytest
import torch

from blockpruner.engine.blocks import Mask
from blockpruner.engine.judge.latency import (
    Generation,
    Measured,
    Speeds,
    generate_in_turn,
    generated_tokens_per_s,
    kv_cache_bytes_per_token,
    peak_memory_bytes,
    weights_bytes,
)
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.sections import ModelSource
from tests.conftest import tiny_llama
from tests.engine.architectures import ROWS

SMALL = Workload(prompt_len=6, num_tokens=4)


@pytest.mark.parametrize(
    "workload",
    [
        SMALL,
        Workload(prompt_len=1, num_tokens=2),
        Workload(prompt_len=5, num_tokens=3, batch_size=3),
        Workload(prompt_len=6, num_tokens=4, static_cache=True),
    ],
)
@pytest.mark.parametrize("mask", ["", "mha.0+mha.2+mlp.1"])
def test_prefill_and_decoding_make_up_the_whole_generation(workload: Workload, mask: str) -> None:
    model = tiny_llama(torch.float32)
    speeds = Generation(prune(model, Mask.parse(mask)) if mask else model, workload)()
    assert list(speeds) == ["prefill_tokens_per_s", "decode_tokens_per_s", f"generate_{workload.num_tokens}_s"]
    prefill_s = workload.batch_size * workload.prompt_len / speeds["prefill_tokens_per_s"]
    decode_s = workload.batch_size * (workload.num_tokens - 1) / speeds["decode_tokens_per_s"]
    assert prefill_s + decode_s == pytest.approx(speeds[f"generate_{workload.num_tokens}_s"])


def test_a_model_that_would_end_at_once_generates_all_tokens() -> None:
    model = tiny_llama(torch.float32)
    model.generation_config.eos_token_id = list(range(159))  # all but one
    assert Generation(model, SMALL)()["generate_4_s"] > 0


def test_models_generate_in_turn_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def fake(name: str) -> Speeds:
        calls.append(name)
        return {"decode_tokens_per_s": float(len(calls))}

    ticks: list[None] = []
    found = generate_in_turn([lambda: fake("dense"), lambda: fake("pruned")], 2, lambda: ticks.append(None))
    assert calls == ["dense", "pruned"] * 3
    assert [[speeds["decode_tokens_per_s"] for speeds in of_model] for of_model in found] == [[3, 5], [4, 6]]
    assert len(ticks) == 6


def measured(*values: float, size: int | None = 1) -> Measured:
    return Measured([{"decode_tokens_per_s": value} for value in values], {"peak_memory_bytes": size})


def test_figures_are_medians_with_quartiles() -> None:
    assert measured(5, 1, 4, 2, 3, size=7).summary() == {
        "decode_tokens_per_s": 3, "spread": {"decode_tokens_per_s": [2, 4]}, "peak_memory_bytes": 7,
    }  # fmt: skip


def test_a_single_repeat_has_no_spread() -> None:
    assert measured(5).summary()["spread"] == {"decode_tokens_per_s": None}


def test_ratios_compare_each_round_with_itself() -> None:
    """A machine that becomes ten times slower half-way spreads the speeds, but not their ratio."""
    ratio = measured(20, 20, 2, 2, size=3).relative_to(measured(10, 10, 1, 1, size=4))
    assert ratio["decode_tokens_per_s"] == 2
    assert ratio["spread"] == {"decode_tokens_per_s": [2, 2]}
    assert ratio["peak_memory_bytes"] == 0.75
    assert measured(1, size=None).relative_to(measured(1))["peak_memory_bytes"] is None


@pytest.mark.parametrize(
    ("row", "values_per_layer"),
    [
        ("llama", 2 * 8),
        ("mistral sliding", 2 * 8),
        ("qwen3", 2 * 16),
        ("gemma3", 2 * 8),
        ("gpt2", 4 * 8),
        ("bloom", 4 * 8),
        ("falcon parallel", 1 * 8),
        ("mixtral", 2 * 8),
    ],
)
def test_kv_cache_bytes_are_those_of_keys_and_values_of_all_attentions(row: str, values_per_layer: int) -> None:
    model = ROWS[row].model()
    size = ROWS[row].dtype.itemsize
    assert kv_cache_bytes_per_token(model) == 2 * 4 * values_per_layer * size
    pruned = prune(model, Mask.parse("mha.1+mlp.2+mha.3"))
    assert kv_cache_bytes_per_token(pruned) == 2 * 2 * values_per_layer * size


def test_peak_memory_remembers_what_was_freed() -> None:
    device = torch.device("cpu")
    size = 2**28
    before = peak_memory_bytes(device)
    torch.ones(size, dtype=torch.uint8)
    after = peak_memory_bytes(device)
    assert before is not None
    assert after is not None
    assert after >= max(before, size)


def test_weights_on_disk_are_all_weight_files(tiny_folder: Path, tmp_path: Path) -> None:
    assert weights_bytes(ModelSource(str(tiny_folder))) == (tiny_folder / "model.safetensors").stat().st_size
    tiny_llama(torch.float32).save_pretrained(tmp_path, max_shard_size=20_000)
    shards = list(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert weights_bytes(ModelSource(str(tmp_path))) == sum(shard.stat().st_size for shard in shards)


def test_models_in_one_process_are_compared_by_generated_tokens() -> None:
    dense = tiny_llama(torch.float32)
    speeds = generated_tokens_per_s([dense, prune(dense, Mask.parse("mha.1"))], SMALL, repeats=1)
    assert len(speeds) == 2
    assert min(speeds) > 0
