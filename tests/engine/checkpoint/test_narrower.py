"""Models with narrower MLPs in every format: what loads gives what was pruned."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.channels import CHANNELS_FILE, ChannelOrder
from blockpruner.engine.checkpoint.deci import deci_model
from blockpruner.engine.checkpoint.format import Pruned
from blockpruner.engine.checkpoint.formats.grouped import Grouped
from blockpruner.engine.checkpoint.gguf import from_checkpoint, read_base, write_gguf
from blockpruner.engine.checkpoint.grouped import read_channels, read_provenance, write_grouped
from blockpruner.engine.checkpoint.older import add_older_keys
from blockpruner.engine.checkpoint.remainder import what_is_left
from blockpruner.engine.checkpoint.vanilla import vanilla_model
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_model
from blockpruner.engine.model.surgery import check_cache, kept_channels, prune
from blockpruner.engine.sections import ModelSource
from tests.conftest import generate, load, random_windows, tiny_llama, tiny_tokenizer
from tests.engine.architectures import ROWS
from tests.engine.checkpoint.test_gguf import check, dense, write_base

MASK = Mask.parse("mha.0+mlp.0/4+mlp.1+mlp.2/4+mlp.2/3+mlp.2/2+mha.3")
EVERYWHERE = Mask.parse("mha.1+mlp.0/4+mlp.1/4+mlp.2/4+mlp.3")


def order_for(num_channels: int) -> ChannelOrder:
    draw = np.random.default_rng(0)
    mlps = {Block(Kind.MLP, layer): draw.permutation(num_channels).astype(np.int32) for layer in range(4)}
    return ChannelOrder({**mlps, **{Block(Kind.MHA, layer): np.array([1, 0], dtype=np.int32) for layer in range(4)}})


def save(folder: Path, model: PreTrainedModel, mask: Mask = MASK) -> PreTrainedModel:
    """Write a pruned model as `prune` does."""
    decoder = Decoder(model)
    order = order_for(decoder.narrow[Block(Kind.MLP, 0)].num_channels)
    pruned, kept = prune(model, mask, order), kept_channels(decoder, mask, order)
    check_cache(pruned)
    folder.mkdir()
    write_grouped(pruned, tiny_tokenizer(), {"format": "grouped", "removed": []}, folder, kept=kept)
    return pruned


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("phi3", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_the_folder_loads_where_this_project_is_not_installed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    pruned = save(folder, ROWS[name].model().float())
    ids = random_windows() % 120
    script = f"""
import json, sys, torch
sys.meta_path.insert(0, type("Block", (), {{"find_spec": staticmethod(
    lambda name, path=None, target=None: (_ for _ in ()).throw(ImportError(name))
    if name.split(".")[0] == "blockpruner" else None)}}))
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
with torch.inference_mode():
    logits = model(input_ids=torch.tensor({ids.tolist()})).logits
print(json.dumps([sum(weight.numel() for weight in model.parameters()), logits.double().sum().item()]))
"""
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    number, total = json.loads(done.stdout.splitlines()[-1])
    assert number == sum(weight.numel() for weight in pruned.parameters())
    assert total == pytest.approx(pruned(input_ids=ids).logits.double().sum().item(), rel=1e-6)


def test_loading_and_saving_again_changes_nothing(tmp_path: Path) -> None:
    pruned = save(tmp_path / "one", tiny_llama(torch.float32))
    loaded = load(tmp_path / "one")
    assert generate(loaded) == generate(pruned, use_cache=False)
    loaded.save_pretrained(tmp_path / "two")
    add_older_keys(tmp_path / "two")
    for name in ("model.safetensors", "config.json", "modeling_blockpruned_llama.py"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert json.loads((tmp_path / "one" / "config.json").read_text())["mlp_widths"] == {"0": 36, "2": 12}


def test_a_model_without_whole_blocks_is_written_without_a_word_of_widths(tmp_path: Path) -> None:
    save(tmp_path / "whole", tiny_llama(torch.float32), Mask.parse("mha.1+mlp.2"))
    source = (tmp_path / "whole" / "modeling_blockpruned_llama.py").read_text()
    assert "narrow" not in source
    assert "width" not in source
    assert not (tmp_path / "whole" / CHANNELS_FILE).exists()
    assert "mlp_widths" not in json.loads((tmp_path / "whole" / "config.json").read_text())


def test_the_channels_that_were_kept_are_recorded_and_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(folder, tiny_llama(torch.float32))
    provenance, order = read_provenance(str(folder)), order_for(48)
    kept = read_channels(folder, provenance)
    assert kept is not None
    widths = {Block(Kind.MLP, 0): 36, Block(Kind.MLP, 2): 12}
    assert {block: values.tolist() for block, values in kept.channels.items()} == {
        block: order.channels[block][:width].tolist() for block, width in widths.items()
    }
    ChannelOrder({block: order.channels[block][:11] for block in widths}).write(folder / CHANNELS_FILE)
    with pytest.raises(UserError, match="is damaged; restore it"):
        read_channels(folder, provenance)
    (folder / CHANNELS_FILE).write_bytes(b"PK")
    with pytest.raises(UserError, match="missing or damaged"):
        read_channels(folder, provenance)


def test_a_config_with_a_damaged_width_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", tiny_llama(torch.float32))
    file = tmp_path / "model" / "config.json"
    for damaged in ({"0": 0}, {"x": 3}, [36]):
        file.write_text(json.dumps({**json.loads(file.read_text()), "mlp_widths": damaged}))
        with pytest.raises(UserError, match="the config of the pruned checkpoint is damaged"):
            load(tmp_path / "model")


def test_deci_has_a_width_for_each_layer(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32, intermediate_size=1024)
    pruned = prune(model, MASK, order_for(1024))
    written, notes = deci_model(what_is_left(pruned))
    mults = [block.ffn.ffn_mult for block in written.config.block_configs]
    assert [mult and round(2 * mult * 32 / 3) for mult in mults] == [768, None, 256, 1024]
    assert not any("zeros up to the next one" in note for note in notes)
    written.generation_config = pruned.generation_config
    written.save_pretrained(tmp_path / "deci")
    ids = random_windows()
    torch.testing.assert_close(load(tmp_path / "deci", "float32")(ids).logits, pruned(ids).logits)
    _, notes = deci_model(what_is_left(prune(tiny_llama(torch.float32), MASK, order_for(48))))
    assert any("those with 12, 36 channels have zeros up to the next one" in note for note in notes)


def test_llama_cpp_computes_a_width_for_each_layer(tmp_path: Path) -> None:
    pruned = prune(dense("llama"), MASK, order_for(96))
    left = what_is_left(pruned)
    write_gguf(from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32"), left, tmp_path / "model.gguf")
    check(pruned, tmp_path / "model.gguf")
    base = write_base(dense("llama"), tmp_path / "base.gguf", gguf.GGMLQuantizationType.F32)
    content = from_checkpoint(left, None, "q8_0", read_base(base, left))  # only its tokenizer and metadata are used
    write_gguf(content, left, tmp_path / "q8_0.gguf")
    check(pruned, tmp_path / "q8_0.gguf", 0.05)


def test_vanilla_takes_one_width_and_refuses_several() -> None:
    model = tiny_llama(torch.float32)
    alike = prune(model, EVERYWHERE, order_for(48))
    written, _ = vanilla_model(what_is_left(alike), sequential=True)
    assert written.config.intermediate_size == 36
    assert written.model.layers[0].mlp.down_proj.weight.shape == (32, 36)
    with pytest.raises(UserError, match=r"its MLPs have different numbers of channels; use `format=grouped` or deci\."):
        vanilla_model(what_is_left(prune(model, MASK, order_for(48))), sequential=True)


@pytest.mark.parametrize(("text", "told"), [
    ("mlp.0/4+mlp.1/4+mlp.2/4+mlp.3/4", "4 full layers of 4: no whole block is removed; all of its MLPs have 36"),
    ("mlp.0/4+mlp.1/4+mlp.2/4+mlp.3", "4 full layers of 4: of the 1 removed blocks 0 are gone"),
    ("dense", "4 full layers of 4: no whole block is removed"),
])  # fmt: skip
def test_vanilla_says_what_is_saved_by_channels_alone(tmp_path: Path, text: str, told: str) -> None:
    pruned = prune(tiny_llama(torch.float32), Mask.parse(text), order_for(48))
    written, notes = vanilla_model(what_is_left(pruned), sequential=True)
    assert notes[0].startswith(told)
    assert ("36 channels" in notes[0]) is (text != "dense")
    written.generation_config = pruned.generation_config
    written.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path, "float32")(random_windows()).logits, pruned(random_windows()).logits)


@pytest.mark.parametrize(("name", "mask", "why"), [
    ("gemma3", MASK, "its MLPs have different numbers of channels"),
    ("gpt2", EVERYWHERE, "its config has no intermediate_size to say how many channels its MLPs have"),
])  # fmt: skip
def test_a_refusal_of_vanilla_names_only_formats_that_take_the_model(name: str, mask: Mask, why: str) -> None:
    config = ROWS[name].make_config()
    if name == "gpt2":
        del config.intermediate_size  # another family's, which the rows give to all
    model = AutoModelForCausalLM.from_config(config).float()
    order = order_for(Decoder(model).narrow[Block(Kind.MLP, 0)].num_channels)
    left = what_is_left(prune(model, mask, order))
    with pytest.raises(UserError, match=rf"{why}; use `format=grouped`\."):
        vanilla_model(left, sequential=True)
    with pytest.raises(UserError, match="the deci format cannot express this model"):
        deci_model(left)


def test_narrower_attentions_are_in_grouped_and_gguf_and_refused_elsewhere(tmp_path: Path) -> None:
    mask = Mask.parse("mha.0/2+mlp.1/4+mha.2+mha.3/2")
    pruned = save(tmp_path / "grouped", dense("llama"), mask)
    assert json.loads((tmp_path / "grouped" / "config.json").read_text())["kept_kv_heads"] == {"0": 1, "3": 1}
    assert generate(load(tmp_path / "grouped")) == generate(pruned, use_cache=False)
    left = what_is_left(pruned)
    write_gguf(from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32"), left, tmp_path / "model.gguf")
    check(pruned, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="every attention, 4 as in the dense model, and some have 2; use"):
        deci_model(left)
    with pytest.raises(UserError, match=r"heads in every attention, and some have fewer; use `format=grouped`\."):
        vanilla_model(left, sequential=True)


@pytest.mark.parametrize(("name", "is_in_gguf"), [("llama", True), ("cohere", False)])
def test_the_note_about_narrower_attentions_names_gguf_only_where_it_can_be_written(
    tmp_path: Path, name: str, is_in_gguf: bool
) -> None:
    save(tmp_path / "pruned", ROWS[name].model().float(), Mask.parse("mha.0/2"))
    source = ModelSource(str(tmp_path / "pruned"))
    pruned = Pruned(load_model(source, "float32"), source, "float32", {})
    (tmp_path / "out").mkdir()
    note = Grouped().write(pruned, tmp_path / "out")[-1]
    assert "use transformers" in note
    assert ("gguf" in note) is is_in_gguf
    left = what_is_left(pruned.model)
    if is_in_gguf:
        assert from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32")
    else:
        with pytest.raises(UserError, match="the gguf format cannot express this model"):
            from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32")
