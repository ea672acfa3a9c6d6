"""`recover`: from a pruned checkpoint to a recovered one, over stops, and what users get wrong."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blockpruner import cli
from blockpruner.engine.errors import RecoveryFailed, UserError
from blockpruner.engine.recovery import training as recovery
from blockpruner.engine.recovery.config import Loss, RecoveryConfig
from blockpruner.engine.recovery.training import recovered_share
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.recovering import recovering
from blockpruner.showing.console import Reporter
from tests import calls
from tests.calls import prune_to
from tests.conftest import TEXT, generate, load
from tests.processes import REPOSITORY

CONFIG = RecoveryConfig.of(lr=0.01, seq_len=16, accumulation=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[number:] * 2}) + "\n" for number in range(12)))
    return path


@pytest.fixture
def pruned(tmp_path: Path, tiny_folder: Path, reporter: Reporter) -> Path:
    (tmp_path / "order.json").write_text('{"1": [["mlp", 1]], "2": [["mlp", 1], ["mha", 2]]}')
    options = {"sequence": tmp_path / "order.json", "dtype": "float32"}
    prune_to(tmp_path / "pruned", reporter, model=str(tiny_folder), **options)
    return tmp_path / "pruned"


Recover = Callable[..., dict[str, Any]]


@pytest.fixture
def recover(pruned: Path, data: Path, tmp_path: Path, reporter: Reporter) -> Recover:
    def call(out: str = "out", folder: Path = pruned, **options: Any) -> dict[str, Any]:
        training = options.pop("config", CONFIG).to_json()
        given = {"folder": folder, "data": str(data), "num_rows": 8, "dtype": "float32", **training, **options}
        return calls.recover(tmp_path / out, reporter, **given)

    return call


def test_distillation_leads_back_to_the_dense_model(recover: Recover, data: Path, tmp_path: Path) -> None:
    """Of two texts, half of the rows each; the teacher is the model that the checkpoint names."""
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text())
    config = RecoveryConfig.of(lr=0.01, seq_len=16, epochs=4, loss=Loss.DISTILL)
    result = recover(data=(str(data), str(other)), num_rows=9, config=config)
    assert (result["num_rows"], result["num_steps"]) == (9, 12)
    recorded = json.loads((tmp_path / "out" / "blockpruner.json").read_text())["recovery"]
    assert recorded["config"]["loss"] == "distill"
    assert recorded["config"]["data"] == [str(data), str(other)]
    assert recorded["losses"][-1] < recorded["losses"][0]


def test_of_output_projections_only_their_weights_differ_from_the_pruned_model(
    recover: Recover, pruned: Path, tmp_path: Path
) -> None:
    config = RecoveryConfig.of(train="projections", lr=0.01, seq_len=16, epochs=3, loss=Loss.DISTILL)
    recover(config=config)
    recorded = json.loads((tmp_path / "out" / "blockpruner.json").read_text())["recovery"]
    assert (recorded["config"]["train"], recorded["config"]["rank"]) == ("projections", None)
    assert recorded["losses"][-1] < recorded["losses"][0]
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in pruned.iterdir()}


def test_the_written_model_is_the_pruned_one_with_lower_perplexity(
    recover: Recover, pruned: Path, tiny_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 5)
    result = recover(
        perplexity=["rest", str(text)], config=RecoveryConfig.of(lr=0.01, seq_len=16, epochs=3), num_windows=4
    )
    assert (result["num_rows"], result["num_steps"]) == (8, 6)
    options = {"perplexity": (str(text),), "seq_len": (16,), "num_windows": 4, "dtype": "float32", "no_ray": True}
    for name, folder in (("dense", tiny_folder), ("pruned", pruned), ("recovered", tmp_path / "out")):
        config = EvaluationConfig(model=str(folder), **options)
        found = evaluate_model(config, reporter)["perplexity"][str(text)]["value"]
        assert result["perplexity"][str(text)][name] == found
    rest = result["perplexity"]["rest"]
    assert rest["recovered"] < rest["pruned"]
    assert rest["recovered_share"] == recovered_share(rest["dense"], rest["pruned"], rest["recovered"])
    side_car = json.loads((tmp_path / "out" / "blockpruner.json").read_text())
    before = json.loads((pruned / "blockpruner.json").read_text())
    assert {**before, "recovery": side_car["recovery"]} == side_car
    assert side_car["recovery"]["perplexity"] == result["perplexity"]
    assert side_car["recovery"]["config"]["rank"] == 32
    assert side_car["recovery"]["losses"][-1] < side_car["recovery"]["losses"][0]
    assert not (tmp_path / "out.work").exists()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {
        p.name for p in (tmp_path / "out/adapter").iterdir()
    }
    kept = {path.name for path in pruned.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {"adapter"}
    for name in kept - {"model.safetensors", "blockpruner.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes(), name
    assert generate(load(tmp_path / "out")) == generate(load(tmp_path / "out"), use_cache=False)


def test_a_stopped_recovery_goes_on_and_ends_the_same(
    recover: Recover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "SAVE_STEPS", 2)
    expected = recover("whole", perplexity=["rest"])

    progress = recovering._progress

    def stopping(reporter: Reporter) -> Callable[[int, int, float], None]:
        def on_step(step: int, num_steps: int, loss: float) -> None:
            if step == 3:
                raise KeyboardInterrupt

        return on_step

    monkeypatch.setattr(recovering, "_progress", stopping)
    with pytest.raises(KeyboardInterrupt):
        recover(perplexity=["rest"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(recovering, "_progress", progress)
    with pytest.raises(
        UserError, match=r"another config: `lr` was 0.01, now 0.02; `num_rows` was 8, now 7; `rows` was"
    ):
        recover(config=RecoveryConfig.of(lr=0.02, seq_len=16, accumulation=2), num_rows=7)
    found = recover(perplexity=["rest"])
    assert {**found, "out": "", "wall_s": 0} == {**expected, "out": "", "wall_s": 0}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_recovery_that_did_not_reach_a_checkpoint_may_start_with_another_config(
    recover: Recover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RecoveryFailed("no")

    with monkeypatch.context() as patched:
        patched.setattr(recovering, "train", fail)
        with pytest.raises(RecoveryFailed):
            recover(perplexity=["rest"])
    assert recover(num_rows=6, perplexity=["rest"])["num_rows"] == 6
    assert not (tmp_path / "out.work").exists()


def test_nothing_appears_when_writing_fails_and_the_training_is_kept(
    recover: Recover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(recovering, "write_grouped", full)
        with pytest.raises(UserError, match="No space left"):
            recover()
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out.work"}
    with monkeypatch.context() as patched:
        patched.setattr(recovery._Trainer, "_loss", full)  # not a step is done again
        recover()
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}


BAD = {
    "a dense model": ({"folder": "DENSE"}, "expected a folder that `blockpruner prune` or `recover` wrote"),
    "no folder": ({"folder": "nowhere"}, "expected a folder that `blockpruner prune` or `recover` wrote"),
    "no data": ({"data": "nowhere.jsonl"}, "'nowhere.jsonl', which does not exist"),
    "no such column": ({"text_column": "words"}, "expected a column 'words'"),
    "no rows": ({"num_rows": 0}, "expected `num_rows` of at least 1"),
    "no rest": ({"num_rows": 12, "perplexity": ["rest"]}, "that are not trained on"),
    "a text that is not there": ({"perplexity": ["nowhere.txt"]}, "'nowhere.txt', which does not exist"),
    "rows beyond the model's positions": ({"config": RecoveryConfig(seq_len=129)}, "at most 128"),
    "float16": ({"dtype": "float16"}, "expected `dtype` bfloat16 or float32"),
    "GPUs that are not there": ({"gpus": 2, "device": "cpu"}, "expected `gpus` of at most 1"),
    "an output folder that exists": ({"out": "pruned"}, "that does not exist yet"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_one_line_and_leaves_nothing(
    recover: Recover, tmp_path: Path, tiny_folder: Path, case: str
) -> None:
    options, message = BAD[case]
    if "folder" in options:
        options = {**options, "folder": tiny_folder if options["folder"] == "DENSE" else tmp_path / "nowhere"}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        recover(**options)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_dense_model_that_is_gone_is_missed_only_for_perplexities(
    recover: Recover, pruned: Path, tmp_path: Path
) -> None:
    side_car = json.loads((pruned / "blockpruner.json").read_text())
    (pruned / "blockpruner.json").write_text(json.dumps({**side_car, "base_model": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        recover(perplexity=["rest"])
    assert not (tmp_path / "out.work").exists()
    assert recover()["perplexity"] == {}
    with pytest.raises(UserError, match="is already recovered"):
        recover("again", folder=tmp_path / "out")


def test_the_command_prints_one_json_line_and_refuses_in_one(
    pruned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*options: object) -> tuple[Any, list[str], list[str]]:
        words = ["blockpruner", "recover", pruned, "--data", data, "--out", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        stdout, stderr = capsys.readouterr()
        return ended.value.code, stdout.splitlines(), stderr.splitlines()

    code, _, stderr = run("--rank", 0)
    assert (code, stderr) == (2, ["error: expected --rank of at least 1, got 0."])
    code, stdout, stderr = run("--num-rows", 4, "--seq-len", 16, "--json")
    assert (code, stderr) == (None, [])
    found = json.loads(stdout[-1])
    assert found.keys() == {"out", "num_rows", "num_steps", "train_loss", "perplexity", "wall_s"}
    assert (found["num_rows"], found["num_steps"], found["perplexity"]) == (4, 1, {})


@pytest.mark.slow
def test_processes_that_share_the_rows_train_what_one_does(pruned: Path, tmp_path: Path) -> None:
    """Two on CPUs, in the first step to rounding; then each has drawn its own dropout. In a process that starts Ray."""
    script = f"""
import torch
from pathlib import Path
from blockpruner.engine.model.loading import load_model
from blockpruner.engine.sections import ModelSource
from blockpruner.cluster.training import train_on_ray
from blockpruner.engine.recovery.config import RecoveryConfig
from blockpruner.engine.recovery.training import recorded_losses, train
source, config = ModelSource({str(pruned)!r}), RecoveryConfig.of(lr=0.01, seq_len=16)
rows = [torch.arange(3, 19) + index for index in range(8)]
train(load_model(source, "float32"), rows, config, Path("one"))
train_on_ray(source, "float32", rows, config, Path("two"), lambda *step: None, num_workers=2, use_gpu=False)
print(recorded_losses(Path("one")), recorded_losses(Path("two")))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(part + "]") for part in done.stdout.splitlines()[-1].split("]")[:2])
    assert len(one) == 2
    assert two[0] == pytest.approx(one[0], abs=1e-3)
    assert two[1] == pytest.approx(one[1], abs=0.2)
