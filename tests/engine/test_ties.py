"""A head of its own in the file stays, whatever the config says about ties: in every placement and every format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.deci import deci_model
from blockpruner.engine.checkpoint.gguf import from_checkpoint
from blockpruner.engine.checkpoint.remainder import what_is_left
from blockpruner.engine.checkpoint.vanilla import vanilla_model
from blockpruner.engine.methods.slicegpt import slicegpt
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.holding import load_decoder
from blockpruner.engine.model.loading import load_model, meta_model
from blockpruner.engine.model.surgery import keep_layers, prune
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement
from tests.conftest import load, random_windows, tiny_llama, tiny_tokenizer
from tests.engine.architectures import ROWS

MASK = Mask.parse("mha.1+mlp.2")
IDS = torch.arange(3, 40)[None]


def store_own_head(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Save a model whose config ties its embedding and its head, and put a head of its own into the file."""
    assert model.config.tie_word_embeddings
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (head,) = (name for name in model.all_tied_weights_keys)
    tensors[head] = model.get_input_embeddings().weight.detach().flip(0).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors[head]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store_own_head(tiny_llama(torch.float32, tie_word_embeddings=True, vocab_size=320), tmp_path / "own")
    tiny_tokenizer().save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def masked(folder: Path) -> torch.Tensor:
    """Logits of the model as transformers loads it, with zeros in place of the mask's blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in MASK.absent:
            layer = model.model.layers[block.layer]
            (layer.self_attn.o_proj if block.kind == "mha" else layer.mlp.down_proj).weight.zero_()
    return logits(model)


@pytest.mark.parametrize("name", ["llama tied", "gemma2", "gpt2", "opt", "bloom"])
def test_a_head_of_its_own_is_loaded_and_counted(name: str, tmp_path: Path) -> None:
    head = store_own_head(ROWS[name].model().float(), tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, head)
    assert not loaded.config.tie_word_embeddings
    assert meta_model(ModelSource(str(tmp_path)), "float32").num_parameters() == loaded.num_parameters()
    pruned = prune(loaded, MASK)
    assert torch.equal(pruned.get_output_embeddings().weight, head)


def test_names_without_the_prefix_of_the_base_model_are_found(tmp_path: Path) -> None:
    store_own_head(ROWS["gpt2"].model().float(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(str(tmp_path))
    assert meta_model(source, "float32").num_parameters() == load_model(source, "float32").num_parameters()
    assert not meta_model(source, "float32").config.tie_word_embeddings


def test_an_equal_copy_of_the_embedding_is_no_head_of_its_own(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(str(tmp_path))
    assert meta_model(source, "float32").num_parameters() == load(tmp_path).num_parameters() == model.num_parameters()
    assert load(tmp_path).config.tie_word_embeddings


def test_a_model_in_memory_keeps_its_head_whatever_its_config_says(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings  # transformers keeps both tensors, but not the config
    assert torch.equal(logits(prune(model, MASK)), masked(folder))
    assert torch.equal(keep_layers(model, [0, 2]).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("placement", [Placement.STREAMED, Placement.SHARDED])
def test_every_placement_computes_with_it(folder: Path, placement: Placement) -> None:
    decoder = load_decoder(ModelSource(str(folder)), "float32", placement, [torch.device("cpu")] * 2)
    check_removable(decoder)
    assert torch.equal(logits(decoder.model), logits(load(folder)))
    assert (
        decoder.shape == Decoder(load(folder)).shape == Decoder(meta_model(ModelSource(str(folder)), "float32")).shape
    )


def test_every_format_writes_it(folder: Path, tmp_path: Path) -> None:
    left, expected = what_is_left(prune(load(folder), MASK)), masked(folder)
    for name, (model, _) in {"deci": deci_model(left), "vanilla": vanilla_model(left, sequential=True)}.items():
        model.save_pretrained(tmp_path / name)
        assert not json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"]
        torch.testing.assert_close(logits(load(tmp_path / name)), expected, rtol=0, atol=1e-4)
    content = from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32")
    assert torch.equal(torch.from_numpy(content.tensors["output.weight"].data), left.weights["lm_head.weight"])


def test_a_sliced_model_starts_from_it(folder: Path) -> None:
    model = load(folder)
    sliced = slicegpt(model, random_windows(), sparsity=0.25).model
    assert torch.equal(sliced.lm_head.weight, model.lm_head.weight)
