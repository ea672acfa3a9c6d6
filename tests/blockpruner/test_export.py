"""`export` and `serve-check`: every format from one pruned folder, the card, and what users get wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from blockpruner import cli
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.agreement import Agreement, agreement
from blockpruner.serving import serve_check
from blockpruner.showing.console import Reporter
from tests import calls
from tests.calls import export, prune_to
from tests.conftest import generate, load, tiny_llama, tiny_tokenizer
from tests.engine.architectures import ROWS
from tests.engine.ggufs import write_gguf


@pytest.fixture
def pruned(tmp_path: Path, tiny_folder: Path, reporter: Reporter) -> Path:
    (tmp_path / "order.json").write_text('{"1": [["mha", 0]], "2": [["mha", 0], ["mlp", 1], ["mha", 2]]}')
    options: dict[str, Any] = {"sequence": tmp_path / "order.json", "dtype": "float32"}
    prune_to(tmp_path / "pruned", reporter, model=str(tiny_folder), **options)
    return tmp_path / "pruned"


@pytest.mark.parametrize("style", ["auto", "deci", "grouped", "vanilla"])
def test_every_format_of_transformers_generates_the_same(
    pruned: Path, tmp_path: Path, reporter: Reporter, style: str
) -> None:
    result = export(pruned, tmp_path / "out", reporter, format=style)
    assert generate(load(tmp_path / "out")) == generate(load(pruned), use_cache=False)
    assert result["format"] == ("deci" if style == "auto" else style)
    assert result["num_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "blockpruner.json", "tokenizer.json", "model.safetensors"} <= files
    assert not any(name.endswith((".bin", ".pt")) for name in files)
    before = json.loads((pruned / "blockpruner.json").read_text())
    after = json.loads((tmp_path / "out" / "blockpruner.json").read_text())
    assert after == {**before, "format": result["format"], "export": after["export"]}


def test_an_architecture_that_deci_cannot_express_is_grouped(tmp_path: Path, reporter: Reporter) -> None:
    dense = tmp_path / "dense"
    ROWS["cohere"].model().float().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    (tmp_path / "order.json").write_text('{"1": [["mha", 0]], "2": [["mha", 0], ["mlp", 1]]}')
    prune_to(tmp_path / "pruned", reporter, model=str(dense), sequence=tmp_path / "order.json", dtype="float32")
    assert export(tmp_path / "pruned", tmp_path / "out", reporter)["format"] == "grouped"
    with pytest.raises(UserError, match="not for 'cohere'; use `format=grouped`"):
        export(tmp_path / "pruned", tmp_path / "deci", reporter, format="deci")
    vanilla = export(tmp_path / "pruned", tmp_path / "vanilla", reporter, format="vanilla")
    assert "0 are gone" in vanilla["notes"][0]
    assert not (tmp_path / "deci").exists()


def test_gguf_is_written_from_the_checkpoints_own_weights(pruned: Path, tmp_path: Path, reporter: Reporter) -> None:
    tiny_tokenizer(adds_space=False).save_pretrained(pruned)
    result = export(pruned, tmp_path / "out", reporter, format="gguf", gguf_type="f16")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"README.md", "blockpruner.json", "model.gguf"}
    assert "one head of zeros" in result["notes"][0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "blockpruner export pruned --format gguf --gguf-type f16 --out out" in card
    assert "library_name: gguf" in card


def test_the_gguf_that_was_pruned_is_known_again_when_its_tensors_are_copied(
    tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "order.json").write_text('{"1": [["mlp", 1]]}')
    base = write_gguf(tiny_llama(torch.float32), tmp_path / "dense.gguf")
    pruned = tmp_path / "pruned"
    prune_to(pruned, reporter, model=str(base), sequence=tmp_path / "order.json", dtype="float32")

    def notes(file: Path, out: str, **options: Any) -> str:
        told = export(pruned, tmp_path / out, reporter, format="gguf", base=str(file), **options)["notes"]
        return " ".join(told)

    another = "the tensors are those of another file: "
    assert another not in notes(base, "own")
    assert another not in notes(shutil.copy(base, tmp_path / "moved.gguf"), "moved")
    other = write_gguf(tiny_llama(torch.float32), tmp_path / "other.gguf", fields={"general.name": "other"})
    assert another in notes(other, "other")
    assert another in (tmp_path / "other" / "README.md").read_text()
    assert another not in notes(other, "converted", gguf_type="f16")
    shutil.copy(other, base)
    with pytest.raises(UserError, match=r"expected the dense model of the checkpoint, .*gguf:.* got .*gguf:"):
        notes(base, "changed")
    assert not (tmp_path / "changed").exists()


def test_the_card_says_what_was_done(pruned: Path, tmp_path: Path, tiny_folder: Path, reporter: Reporter) -> None:
    values = json.loads((pruned / "blockpruner.json").read_text())
    values["calibration"] = {"calibration": "/somewhere/rows.txt", "num_windows": 4, "seq_len": 16, "seed": 42}
    values |= {"dense": {"nll": 1.0, "perplexity": 2.718}, "pruned": {"nll": None, "perplexity": None}}
    rest = {"dense": 5.0, "pruned": 7.0, "recovered": None}
    values["recovery"] = {
        "config": {"rank": 32, "data": "alpaca"}, "num_rows": 8, "perplexity": {"rest": rest},
    }  # fmt: skip
    (pruned / "blockpruner.json").write_text(json.dumps(values))
    scores = tmp_path / "scores.json"
    piqa = {"score": 0.5, "stderr": 0.05}
    found = {"model": "pruned", "tasks": {"piqa": piqa}, "average": 0.5, "setting": {"limit": 100}}
    scores.write_text(json.dumps(found))
    (pruned.parent / "licensed").mkdir()
    licensed = shutil.copytree(tiny_folder, pruned.parent / "licensed" / "tiny")
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    values["base_model"] = str(licensed)
    (pruned / "blockpruner.json").write_text(json.dumps(values))
    export(pruned, tmp_path / "out", reporter, evaluation=[scores])
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "license: mit",
        "| base model | tiny |",
        "| attention removed in layers | 0, 2 |",
        "| MLP removed in layers | 1 |",
        "rows.txt, 4 windows of 16 tokens (seed 42)",
        "| perplexity on the calibration text | 2.718 |  |  |",  # of a search by another metric
        "| perplexity on rest | 5.000 | 7.000 |  |",
        "rank 32, 8 rows of alpaca",
        "value ± standard error; pruned: only the first 100 questions of each task",
        "| pruned | 50.00 ± 5.00 | 50.00 |",
        "vllm serve out --trust-remote-code",
        "blockpruner export pruned --format deci --out out",
    ):
        assert text in card, text
    assert str(tmp_path) not in card


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a dense model": ("DENSE", {}, "which holds a dense model; prune it first"),
    "another folder": ("OTHER", {}, "without blockpruner.json"),
    "an export": ("EXPORT", {}, "an export in the deci format; name the folder that it was made from"),
    "an output that exists": ("PRUNED", {"out": "PRUNED"}, "does not exist yet"),
    "a base without gguf": ("PRUNED", {"base": "x.gguf"}, "expected `base` with `format=gguf`"),
    "gguf from nothing": ("PRUNED", {"format": "gguf"}, "expected `base`, a GGUF of the dense model"),
    "a base that is not there": ("PRUNED", {"format": "gguf", "base": "x.gguf"}, "'x.gguf', which does not exist"),
    "a base that is a folder": ("PRUNED", {"format": "gguf", "base": "OTHER"}, r"expected a \.gguf file for `base`"),
    "a recovered one from a base": ("RECOVERED", {"format": "gguf", "base": "x.gguf"}, "weights that recover trained"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(
    pruned: Path, tiny_folder: Path, tmp_path: Path, reporter: Reporter, case: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    places = {"DENSE": tiny_folder, "OTHER": other, "PRUNED": pruned, "EXPORT": tmp_path / "export"}
    name, options, message = BAD[case]
    if name == "EXPORT":
        export(pruned, tmp_path / "export", reporter)
    if name == "RECOVERED":
        places["RECOVERED"] = pruned
        values = json.loads((pruned / "blockpruner.json").read_text())
        recovery = {"config": {"rank": 8, "data": "alpaca"}, "num_rows": 8, "perplexity": {}}
        (pruned / "blockpruner.json").write_text(json.dumps({**values, "recovery": recovery}))
    options = {key: places.get(value, value) for key, value in options.items()}
    if "base" in options:
        options["base"] = str(options["base"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        export(places[name], options.pop("out", tmp_path / "out"), reporter, **options)
    assert sorted(tmp_path.iterdir()) == before


def test_runtimes_are_compared_with_the_pruned_model(
    pruned: Path, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is here; vLLM is said to be missing, and never passed."""
    monkeypatch.setattr(serve_check, "has_module", lambda python, module: module == "transformers")
    export(pruned, tmp_path / "out", reporter)
    penalty = {"repetition_penalty": 3.0, "do_sample": True, "eos_token_id": list(range(160))}
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps(penalty))  # it is no matter of the export
    result = calls.serve_check(tmp_path / "out", reporter, num_tokens=6, threads=1)
    transformers, vllm = result["results"]
    assert (transformers["result"], transformers["num_same"], transformers["num_tokens"]) == ("same", 18, 18)
    assert transformers["largest_difference"] < 1e-4
    assert vllm == {"runtime": "vLLM", "version": None, "result": "not installed"}


def test_a_runtime_that_breaks_and_one_that_generates_something_else_fail(
    pruned: Path, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_check, "has_module", lambda python, module: True)
    export(pruned, tmp_path / "out", reporter)

    def answer(python: str, runtime: serve_check.Runtime, request: dict[str, Any]) -> dict[str, Any]:
        if runtime.name == "vLLM":
            raise serve_check.RuntimeFailed("ValueError: too many values to unpack")
        top = [[[(3, -0.1)]] * 6] * 3
        return {"version": "1", "tokens": [[3] * 6] * 3, "top": top}

    monkeypatch.setattr(serve_check, "run_runtime", answer)
    result = calls.serve_check(tmp_path / "out", reporter, num_tokens=6, threads=1)
    assert [found["result"] for found in result["results"]] == ["differs", "failed"]
    assert result["results"][1]["error"] == "ValueError: too many values to unpack"


def test_an_export_is_only_compared_with_its_own_checkpoint(
    pruned: Path, tmp_path: Path, tiny_folder: Path, reporter: Reporter
) -> None:
    export(pruned, tmp_path / "out", reporter)
    pruned.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"which does not exist; set its path with `pruned`"):
        calls.serve_check(tmp_path / "out", reporter)
    with pytest.raises(UserError, match="expected the checkpoint that"):
        calls.serve_check(tmp_path / "out", reporter, pruned=tiny_folder)
    with pytest.raises(UserError, match=r"without blockpruner\.json"):
        calls.serve_check(tiny_folder, reporter)
    with pytest.raises(UserError, match=r"interpreter for `python`, got '.*nowhere/python', which is not executable"):
        calls.serve_check(tmp_path / "out", reporter, pruned=tmp_path / "moved", python=[Path("nowhere/python")])


def test_agreement_follows_what_the_program_generated() -> None:
    model = tiny_llama(torch.float32)
    prompts = [[5, 9, 12], [7, 3]]
    tokens, top = [], []
    for prompt in prompts:
        ids = list(prompt)
        steps = []
        for _ in range(4):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(logits.argmax()))
            steps.append([(ids[-1], logits.max().item())])
        tokens.append(ids[len(prompt) :])
        top.append(steps)
    assert agreement(model, prompts, tokens, top).verdict == "same"
    tokens[0][1] = (tokens[0][1] + 1) % 160
    assert agreement(model, prompts, tokens, top).num_same < 8


def test_verdicts() -> None:
    assert Agreement(100, 100, 0.1, 0.01).verdict == "same"
    assert Agreement(100, 95, 0.5, 0.1).verdict == "close"
    assert Agreement(100, 80, 0.5, 0.1).verdict == "differs"
    assert Agreement(100, 100, 3.0, 0.5).verdict == "differs"


def test_the_command_line_exports_and_refuses_in_one_line(pruned: Path, tmp_path: Path, tiny_folder: Path) -> None:
    done = CliRunner().invoke(cli.app, ["export", str(pruned), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["format"] == "deci"
    refused = CliRunner().invoke(cli.app, ["export", str(tiny_folder), "--out", str(tmp_path / "other")])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: expected a folder that")
    assert refused.stderr.count("\n") == 1


def test_a_runtime_that_fails_ends_the_command_with_1(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_check, "has_module", lambda python, module: module == "vllm")

    def fail(python: str, runtime: serve_check.Runtime, request: dict[str, Any]) -> dict[str, Any]:
        raise serve_check.RuntimeFailed("no memory")

    monkeypatch.setattr(serve_check, "run_runtime", fail)
    done = CliRunner().invoke(cli.app, ["serve-check", str(pruned), "--json"])
    assert done.exit_code == 1
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [found["result"] for found in results] == ["not installed", "failed"]
