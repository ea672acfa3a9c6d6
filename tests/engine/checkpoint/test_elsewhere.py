"""What other programs read: transformers 4, vLLM, llama.cpp's converter, and other users of the machine."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.card import model_card, names_hub_id
from blockpruner.engine.checkpoint.format import Format, Pruned
from blockpruner.engine.checkpoint.formats.deci import Deci
from blockpruner.engine.checkpoint.formats.grouped import Grouped
from blockpruner.engine.checkpoint.formats.vanilla import Vanilla
from blockpruner.engine.checkpoint.older import add_older_keys, older_keys
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.model.tokenizer_files import write_tokenizer
from blockpruner.engine.modes import ordinary_modes
from blockpruner.engine.sections import ModelSource
from tests.conftest import load, tiny_llama, tiny_tokenizer
from tests.engine.architectures import ROWS, Row

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
IDS = torch.arange(3, 51)[None]


def export(form: Format, row: Row, folder: Path) -> None:
    """Prune a model of a row, and write it to a new folder in a format."""
    dense = folder.with_name(f"{folder.name}-dense")
    row.model().float().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    folder.mkdir()
    pruned = prune(load(dense), Mask.parse("mha.0+mlp.1+mha.2"))
    form.write(Pruned(pruned, ModelSource(str(dense)), "float32", {}), folder)


@pytest.mark.parametrize("form", [Vanilla(), Grouped(), Deci()], ids=lambda form: form.name)
def test_a_config_says_rope_and_dtype_in_the_older_way_too(form: Format, tmp_path: Path) -> None:
    export(form, Row("LlamaConfig", {"rope_parameters": LLAMA3}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {**scaling, "type": "llama3"}
    assert config["rope_parameters"] == LLAMA3
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 7.0}, {"rope_theta": 7.0, "rope_scaling": None}),
        (
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 2},
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        ),
        (
            {"full_attention": {"rope_type": "linear", "rope_theta": 7.0, "factor": 8.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 3.0}},
            {"rope_theta": 7.0, "rope_local_base_freq": 3.0,
             "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0}},
        ),
        ({"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5},
         {"rope_theta": 7.0, "partial_rotary_factor": 0.5, "rope_scaling": None}),
        (None, {}),
    ],
)  # fmt: skip
def test_every_kind_of_rope_has_older_keys(values: dict[str, object] | None, expected: dict[str, object]) -> None:
    assert older_keys({"model_type": "any", "rope_parameters": values}) == expected


def test_families_that_are_strict_get_only_the_fields_that_they_take() -> None:
    longrope = {"rope_type": "longrope", "rope_theta": 7.0, "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0}
    keys = older_keys({"model_type": "phi3", "rope_parameters": longrope})
    assert keys["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    rope = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    keys = older_keys({"model_type": "blockpruned_gpt_neox", "rope_parameters": rope})
    assert (keys["rotary_emb_base"], keys["rotary_pct"]) == (7.0, 0.5)


def test_the_tokenizers_own_files_come_along_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_tokenizer().save_pretrained(source)
    values = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": "LlamaTokenizerFast"}))
    (source / "additional_chat_templates").mkdir()
    extra = ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt", "LICENSE")
    for name in (*extra, "additional_chat_templates/tool.jinja"):
        (source / name).write_text(f"the content of {name}")
    (source / "model.safetensors").write_text("weights")
    (source / "README.md").write_text("about the source")
    (tmp_path / "written").mkdir()
    write_tokenizer(tiny_tokenizer(), tmp_path / "written", ModelSource(str(source)))

    def files(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    expected = files(source)
    assert files(tmp_path / "written") == {
        name: content for name, content in expected.items() if name not in ("model.safetensors", "README.md")
    }


def test_a_tokenizer_in_memory_is_written_with_a_class_that_all_versions_know(tmp_path: Path) -> None:
    write_tokenizer(tiny_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(("umask", "of_folders"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_what_is_written_has_the_permissions_that_the_umask_says(tmp_path: Path, umask: int, of_folders: int) -> None:
    folder = tmp_path / "out"
    before = os.umask(umask)
    try:
        folder.mkdir(mode=0o700)
        (folder / "inner").mkdir(mode=0o700)
        tiny_llama(torch.float32).save_pretrained(folder / "inner")
        ordinary_modes(folder)
    finally:
        os.umask(before)
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == (of_folders if path.is_dir() else of_folders & 0o666)
    assert not (folder / ".probe").exists()


def test_where_layers_lose_their_pattern_a_note_says_so(tmp_path: Path) -> None:
    def notes_without(text: str, name: str) -> list[str]:
        pruned = prune(ROWS["gemma2"].model().float(), Mask.parse(text))
        return Vanilla().write(Pruned(pruned, _with_tokenizer(tmp_path), "float32", {}), _new(tmp_path / name))

    assert "no longer follow the pattern" in notes_without("mha.0+mlp.0", "first")[1]
    assert len(notes_without("mha.3+mlp.3", "last")) == 1


def test_weights_with_other_names_in_transformers_4_are_said_to_need_5(tmp_path: Path) -> None:
    pruned = prune(ROWS["gpt_neox parallel"].model().float(), Mask.parse("mha.0"))
    notes = Grouped().write(Pruned(pruned, _with_tokenizer(tmp_path), "float32", {}), _new(tmp_path / "out"))
    assert "needs transformers 5" in notes[0]
    assert "raise ImportError" in (tmp_path / "out" / "modeling_blockpruned_gpt_neox.py").read_text()
    pruned = prune(tiny_llama(torch.float32), Mask.parse("mha.0"))
    assert Grouped().write(Pruned(pruned, _with_tokenizer(tmp_path), "float32", {}), _new(tmp_path / "llama")) == []


def _with_tokenizer(tmp_path: Path) -> ModelSource:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return ModelSource(str(tmp_path / "tokenizer"))


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


READ = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.arange(3, 51)[None], use_cache=False).logits, folder / "logits.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif("OTHER_PYTHON" not in os.environ, reason="$OTHER_PYTHON is a Python with transformers 4.57")
def test_every_export_gives_the_same_logits_in_transformers_4(tmp_path: Path) -> None:
    rows = {
        **{name: ROWS[name] for name in ROWS if name not in ("gpt2 scaled by layer", "gpt_neo (no row in the engine)")},
        "llama3": Row("LlamaConfig", {"rope_parameters": LLAMA3}),
    }  # of the two left out, the dense model already differs there
    folders = {}
    for number, row in enumerate(rows.values()):
        for form in (Vanilla(), Grouped(), Deci()):
            folder = tmp_path / f"{number}-{form.name}"
            try:
                export(form, row, folder)
            except UserError:
                continue
            if "raise ImportError" not in "".join(file.read_text() for file in folder.glob("modeling_*.py")):
                folders[folder] = load(folder)(input_ids=IDS, use_cache=False).logits
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([os.environ["OTHER_PYTHON"], "-c", READ, *map(str, folders)], check=True, env=environment)
    for folder, logits in folders.items():
        difference = (torch.load(folder / "logits.pt") - logits).abs().max() / logits.std()
        assert difference < 1e-4, folder


def test_keys_that_are_there_already_stay(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32", "torch_dtype": "float16"}')
    add_older_keys(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"


def test_the_card_names_a_base_model_only_if_it_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names_hub_id("org/name")
    assert not any(map(names_hub_id, ("models/tiny", str(tmp_path / "models"), "smollm2", "models/tiny.gguf", "./a")))
    provenance = {
        "base_model": "org/name", "removed": [["mha", 0]], "num_parameters_dense": 2, "num_parameters": 1, "ratio": 0.5,
        "dtype": "float32", "blockpruner": "1",
    }  # fmt: skip

    def card(**values: object) -> str:
        return model_card("out", Vanilla(), {**provenance, **values}, licence=None, notes=[], command="")

    assert "base_model: org/name" in card()
    assert "base_model:" not in card(base_model="models/tiny")
    assert "base_model:" not in card(base_model="/where/it/was/pruned/models/tiny")  # which need not exist any more


YOUNG = ["mellum", "laguna", "mimo_v2_flash", "lfm3", "gemma4_text", "gemma4_unified_text"]


@pytest.mark.parametrize("name", ["gemma3_text", "modernbert-decoder", *YOUNG])
def test_a_config_with_rope_by_layer_type_is_read_as_it_was(name: str) -> None:
    """Types that are younger than `rope_scaling` would take it for all of their `rope_parameters`."""
    kind = CONFIG_MAPPING[name]
    values = kind().to_dict()
    assert any(isinstance(value, dict) for value in values["rope_parameters"].values())
    older = older_keys(values)
    assert ("rope_scaling" in older) == (name not in YOUNG)
    assert kind(**{**older, **values}).rope_parameters == kind(**values).rope_parameters
