"""What may lie in a model's folder, and what is refused at the door."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GPT2Config,
    MixtralConfig,
)

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import check_tensors, load_config, materialize, meta_model, stored_dtype
from blockpruner.engine.sections import ModelSource
from tests.conftest import TINY, load, tiny_llama

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llama(torch.float32).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return tmp_path / "sharded"


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def put(folder: Path, **tensors: torch.Tensor) -> None:
    """Add tensors to the weights; "__" stands for a dot."""
    stored = load_file(folder / WEIGHTS)
    save_file(stored | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def refusal(folder: Path, act: Callable[[ModelSource], object] | None = None) -> str:
    """The line with which a folder is refused: by its files alone, unless `act` says otherwise."""
    with pytest.raises(UserError) as error:
        (act or (lambda source: load_config(materialize(source, "float32"))))(ModelSource(str(folder)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert "merge it first" in refusal(folder)


def test_a_folder_with_an_adapter_alone_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter in it" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "modelopt", "fp8", "mxfp4"])
def test_a_quantised_checkpoint_is_refused_from_its_config_alone(folder: Path, method: str) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": method})
    (folder / WEIGHTS).unlink()
    assert f"quantised by {method}; give the unquantised checkpoint" in refusal(folder, load_config)


@pytest.mark.parametrize(
    ("name", "method"), [("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq")]
)  # fmt: skip
def test_files_of_quantisation_are_refused(folder: Path, name: str, method: str) -> None:
    (folder / name).write_text("{}")
    assert f"quantised by {method}" in refusal(folder)


def test_the_config_of_an_mlx_model_is_called_quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization={"group_size": 64, "bits": 4})
    assert "give the unquantised checkpoint" in refusal(folder)


def test_weights_in_eight_bits_are_refused_even_if_no_config_says_so(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**stored, name: stored[name].to(torch.float8_e4m3fn)}, folder / WEIGHTS)
    assert f"got '{name}' in F8_E4M3" in refusal(folder)


def as_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def as_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def as_link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def as_link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def as_empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (as_lfs_pointer, "git lfs pull"),
        (as_fifo, "a pipe"),
        (as_folder, "which is a folder"),
        (as_link_to_nothing, "a link to 'nowhere', which cannot be followed"),
        (as_link_to_itself, "which cannot be followed"),
        (as_empty, "an empty file"),
    ],
)
def test_what_is_no_file_is_called_what_it_is_and_never_waited_for(
    folder: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder / name)
    said = refusal(folder)
    assert message in said
    assert name in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(folder: Path) -> None:
    (folder / WEIGHTS).chmod(0)
    assert "make it readable" in refusal(folder)


@pytest.mark.parametrize("elsewhere", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "a.bin"])
def test_an_index_may_only_name_files_in_its_folder(sharded: Path, elsewhere: str) -> None:
    names = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={**names, "model.norm.weight": elsewhere})
    assert f"in its own folder, got {elsewhere!r}" in refusal(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object"),
        ('{"metadata": {}}', "got another 'weight_map'"),
        ('{"metadata": {}, "weight_map": {}}', "got another 'weight_map'"),
        ('{"metadata": {}, "weight_map": ["a"]}', "got another 'weight_map'"),
        ('{"weight_map": {"a": "model-00001-of-00009.safetensors"}}', "got another 'metadata'"),
        ('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "1 are missing, 'b.safetensors'"),
    ],
)
def test_a_damaged_index_is_refused(sharded: Path, content: str, message: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError, match=message):
        materialize(ModelSource(str(sharded)), "float32")


def test_shards_that_are_missing_are_counted(sharded: Path) -> None:
    first, *_ = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    assert f"1 are missing, {first.name!r} among them" in refusal(sharded)


def test_a_shard_of_another_download_is_refused(sharded: Path) -> None:
    first, *_ = sorted(sharded.glob("*.safetensors"))
    shutil.copy(first, sharded / "model-00099-of-00100.safetensors")
    assert "found 'model-00099-of-00100.safetensors', which model.safetensors.index.json does not name" in refusal(
        sharded
    )


def test_a_tensor_that_only_the_index_knows_is_counted(sharded: Path) -> None:
    names = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={**names, "ghost.weight": next(iter(names.values()))})
    assert "1 of them are in none of its files, 'ghost.weight' among them" in refusal(sharded)


def test_two_sets_of_weights_are_refused(sharded: Path, folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, sharded)
    assert "found both" in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    save_file({**load_file(first), **load_file(second)}, first, metadata={"format": "pt"})
    assert "expected every tensor once" in refusal(sharded)


def test_shards_without_an_index_are_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert f"expected {INDEX} beside the shards" in refusal(sharded)


def test_weights_in_another_layout_beside_the_model_are_noted(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "consolidated.safetensors")
    said: list[str] = []
    materialize(ModelSource(str(folder)), "float32", said.append)
    assert said == [f"note: not read in '{folder}': 'consolidated.safetensors'"]
    assert stored_dtype(ModelSource(str(folder))) == "float32"


def test_tensors_that_the_model_does_not_use_are_counted(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=2)
    said = refusal(folder, lambda source: load(folder))
    assert "18 tensors of the file are not used by the model, 'model.layers.2." in said


def test_another_head_is_not_dropped_without_a_word(folder: Path) -> None:
    put(folder, score__weight=torch.zeros(1, 32))
    assert "1 tensors of the file are not used" in refusal(folder, lambda source: load(folder))


def test_shapes_that_do_not_fit_are_named_with_both_shapes(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)
    said = refusal(folder, lambda source: load(folder))
    assert "12 tensors have another shape, 'model.layers.0.mlp.down_proj.weight' among them" in said
    assert "[32, 48] in the file, [32, 64] by the config" in said


def test_buffers_of_older_versions_are_harmless(folder: Path, tmp_path: Path) -> None:
    put(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert load(folder).num_parameters() == tiny_llama().num_parameters()
    old = tmp_path / "gpt2"
    AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=160, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    ).save_pretrained(old)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    put(old, h__0__attn__bias=mask, h__0__attn__masked_bias=torch.tensor(-1e4))
    load(old)


def test_what_a_class_leaves_out_on_purpose_is_said(tmp_path: Path) -> None:
    sizes = {**TINY, "num_hidden_layers": 1, "moe_intermediate_size": 16, "n_routed_experts": 2, "head_dim": 8}
    config = Glm4MoeConfig(**sizes, num_experts_per_tok=1, n_group=1, topk_group=1, first_k_dense_replace=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    assert check_tensors(meta_model(source, "float32"), source) == []
    put(tmp_path, model__layers__46__eh_proj__weight=torch.ones(32, 64))
    load(tmp_path)
    (note,) = check_tensors(meta_model(source, "float32"), source)
    assert note.startswith("1 tensors are left out by transformers on purpose ('model.layers.46.eh_proj.weight'")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2.5),
        ("num_hidden_layers", True),
        ("hidden_size", 0),
        ("hidden_size", 10**12),
        ("vocab_size", -5),
        ("vocab_size", "160"),
        ("intermediate_size", [48, 0]),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -2),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", 0),
        ("dtype", "auto"),
        ("torch_dtype", "float8_e4m3fn"),
        ("model_type", None),
        ("model_type", 3),
        ("transformers_weights", "/etc/passwd"),
    ],
)
def test_a_config_with_an_impossible_value_is_refused_by_the_name_of_its_key(
    folder: Path, key: str, value: object
) -> None:
    edit(folder / "config.json", **{key: value})
    assert f"'{key}'" in refusal(folder)


def test_a_window_of_nothing_is_taken_only_where_none_is_used(folder: Path) -> None:
    """So transformers saves Qwen2-MoE."""
    edit(folder / "config.json", sliding_window=0)
    assert "'sliding_window'" in refusal(folder)
    edit(folder / "config.json", sliding_window=0, use_sliding_window=False)
    assert load_config(ModelSource(str(folder))).hidden_size


def test_a_type_that_transformers_does_not_know_is_called_that(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama9")
    assert "an unknown 'model_type'; install a newer transformers" in refusal(folder)


def test_more_experts_a_token_than_there_are_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="mixtral", num_local_experts=4, num_experts_per_tok=8)
    assert "'num_experts_per_tok' of at most 4 (the experts)" in refusal(folder)


@pytest.fixture
def routed(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(**{**TINY, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "routed")
    return tmp_path / "routed"


def test_experts_with_a_gap_in_their_numbers_are_refused(routed: Path) -> None:
    stored = load_file(routed / WEIGHTS)
    moved = {name.replace("experts.1.", "experts.4."): value for name, value in stored.items()}
    save_file(moved, routed / WEIGHTS, metadata={"format": "pt"})
    assert "'model.layers.0.block_sparse_moe.experts.*.w1.weight' without 1" in refusal(routed)


def test_an_expert_that_is_not_whole_is_refused(routed: Path) -> None:
    stored = load_file(routed / WEIGHTS)
    del stored["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    stored["model.layers.0.block_sparse_moe.experts.3.w1.weight"] = torch.zeros(3, 3)
    save_file(stored, routed / WEIGHTS, metadata={"format": "pt"})
    assert "such as the experts of a layer" in refusal(routed, lambda source: load(routed))


def test_a_model_in_memory_with_an_adapter_is_refused(folder: Path) -> None:
    model = load(folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="merge them first"):
        Decoder(model)


def test_a_nested_config_without_end_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert "expected a JSON object" in refusal(folder)


def test_the_stored_dtype_is_that_of_most_bytes(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    mixed = {name: value if "norm" in name else value.bfloat16() for name, value in stored.items()}
    save_file(mixed, folder / WEIGHTS, metadata={"format": "pt"})
    assert stored_dtype(ModelSource(str(folder))) == "bfloat16"


def test_a_file_is_no_model_folder(folder: Path) -> None:
    assert "got the file" in refusal(folder / WEIGHTS)
    assert "expected a Hugging Face id" in refusal(Path("x" * 5000))
