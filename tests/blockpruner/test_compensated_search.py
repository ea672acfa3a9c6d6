"""`search --compensate`: scores of refitted models, the same bits after stops and for any number of replicas."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import blockpruner as bp
from blockpruner.engine.blocks import Mask
from blockpruner.engine.compensation.changed_file import read_changed
from blockpruner.engine.compensation.replica import CompensationReplica, StageSums
from blockpruner.engine.compensation.searching import CompensatedUnit, CompensatingReplica, FitUnit
from blockpruner.engine.compensation.stages import Stages
from blockpruner.engine.compensation.surgery import put_changed
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.evaluation import mean_nll
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import prune
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import read_history
from blockpruner.searching.records import CompensationRecord, StepRecord
from blockpruner.showing.console import Reporter
from tests import calls
from tests.blockpruner.recorded import units_and_steps
from tests.conftest import TEXT, load
from tests.processes import finish

Search = Callable[..., Path]
NUM_SCORED, NUM_FITTED = 8, 24


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return tmp_path / "text.txt"


@pytest.fixture
def search(trained_folder: Path, text: Path, tmp_path: Path, reporter: Reporter) -> Search:
    def call(out: str = "run", **options: Any) -> Path:
        given = {
            "model": str(trained_folder), "calibration": str(text), "num_samples": 40, "seq_len": 16,
            "num_windows": NUM_SCORED + NUM_FITTED, "compensate_windows": NUM_FITTED, "compensate": True,
            "dtype": "float64", "num_remove": 3, "threads_per_replica": 1, "no_ray": True,
            "keep": ("mha.2", "mlp.1"),  # without them the model would be better: it has learnt too much
        }  # fmt: skip
        run_search(SearchConfig.of(**{**given, **options}), tmp_path / out, reporter)
        return tmp_path / out

    return call


def recorded(run: Path) -> list[Any]:
    """What two runs must agree on: all of the units, steps and refits but times and names."""
    history = read_history(run / "ledger.jsonl")
    refits = [(one.step, one.mask, one.digest, one.window_sums) for one in history.all(CompensationRecord)]
    return [*units_and_steps(history), refits]


def test_scores_are_those_of_refitted_models_without_the_candidates(
    search: Search, trained_folder: Path, text: Path
) -> None:
    run = search()
    history = read_history(run / "ledger.jsonl")
    first, second, _ = history.all(CompensationRecord)
    assert first.is_used
    assert second.is_used
    dense, tokenizer = bp.load(trained_folder, dtype="float64")
    windows = bp.calibration(text, tokenizer, num_samples=40, seq_len=16, num_windows=NUM_SCORED).tokens
    for refit in (first, second):
        (changed,) = read_changed(run / "refits" / f"{refit.digest[:16]}.safetensors")
        stages = Stages.of(Decoder(dense), Mask.parse(refit.mask)).to_fit
        base = prune(dense, Mask.parse(refit.mask))
        put_changed(base, stages, "model.layers", changed)
        nlls = [mean_nll(base, window) * 15 for window in windows]
        assert nlls == pytest.approx(refit.window_sums, rel=1e-10)
        phase = history.sums(refit.step + 1).sums
        assert len(phase) == 6 - refit.step
        for mask, sums in phase.items():
            candidate = prune(dense, mask)
            kept = {block: one for block, one in changed.items() if block not in mask.absent}
            put_changed(candidate, stages_left(stages, mask), "model.layers", kept)
            nlls = [mean_nll(candidate, window) * 15 for window in windows]
            assert nlls == pytest.approx([sums[window] for window in range(NUM_SCORED)], rel=1e-10)


def stages_left(stages: Any, mask: Mask) -> list[Any]:
    return [stage for stage in stages if not set(stage.blocks) & mask.absent]


def test_a_refit_changes_what_is_removed_later_and_lowers_the_loss(search: Search) -> None:
    with_refits, without = search("with"), search("without", compensate=False, compensate_windows=None, num_windows=8)
    now, then = (read_history(run / "ledger.jsonl").all(StepRecord) for run in (with_refits, without))
    assert (now[0].block, now[0].nll) == (then[0].block, then[0].nll)
    assert now[-1].nll is not None
    assert then[-1].nll is not None
    assert now[-1].nll < then[-1].nll


@pytest.mark.parametrize("strategy", ["greedy", "lazy"])
def test_a_grown_run_has_the_bits_of_one_in_one_go_also_without_its_files(
    search: Search, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = recorded(search("whole", strategy=strategy, num_remove=4))
    run = search("grown", strategy=strategy, num_remove=2)
    for file in (run / "refits").iterdir():
        file.unlink()
    search("grown", strategy=strategy, num_remove=3)
    assert "fitting them again" in capsys.readouterr().out
    for file in (run / "refits").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert recorded(search("grown", strategy=strategy, num_remove=4)) == whole


def test_a_refit_that_was_recorded_before_a_stop_is_not_made_again(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recorded(search("whole"))
    real = StepRecord.of

    def stopping(**values: Any) -> Any:
        if values["step"] == 2:
            raise KeyboardInterrupt
        return real(**values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepRecord, "of", stopping)
        search("stopped")
    assert recorded(search("stopped")) == whole


@pytest.mark.slow  # as those of a compensation (test_compensate.py)
def test_two_replicas_give_the_bits_of_one(search: Search, trained_folder: Path, text: Path, tmp_path: Path) -> None:
    finish(
        [
            sys.executable, "-m", "blockpruner", "search", str(trained_folder), "--calibration", str(text),
            "--num-samples", "40", "--seq-len", "16", "--num-windows", "32", "--compensate", "--compensate-windows",
            "24", "--dtype", "float64", "--num-remove", "3", "--threads-per-replica", "1", "--keep",
            "mha.2,mlp.1", "--replicas", "2", "--out", str(tmp_path / "two"),
        ]
    )  # fmt: skip
    assert recorded(tmp_path / "two") == recorded(search("one"))


def test_a_streamed_model_gives_the_bits_of_a_resident_one(search: Search) -> None:
    assert recorded(search("streamed", placement="streamed")) == recorded(search("resident"))


def test_replicas_that_know_nothing_of_earlier_units_give_the_same_bits(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each replica died after a few units."""
    whole = recorded(search("whole"))
    real, count = CompensatingReplica.score, 0

    def forgetting(self: CompensatingReplica, unit: Any) -> Any:
        nonlocal count
        count += isinstance(unit, FitUnit | CompensatedUnit)
        if count % 5 == 0:
            self.release()
            again = CompensatingReplica(self._decoder, self._scoring._windows, self._fitted_on, self._tokens_per_call)
            self.__dict__.update(again.__dict__)
        return real(self, unit)

    monkeypatch.setattr(CompensatingReplica, "score", forgetting)
    assert recorded(search("forgetful")) == whole
    assert count > 50


def test_a_refit_that_does_not_help_is_not_used(
    search: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = CompensationReplica.score

    def misleading(self: CompensationReplica, unit: Any) -> Any:
        value, seconds = real(self, unit)
        if isinstance(value, StageSums):
            assert value.dense is not None
            value = StageSums(replace(value.dense, cross=value.dense.cross * -20), value.pruned)
        return value, seconds

    without = search("without", compensate=False, compensate_windows=None, num_windows=8)
    monkeypatch.setattr(CompensationReplica, "score", misleading)
    history = read_history(search() / "ledger.jsonl")
    assert not any(record.is_used for record in history.all(CompensationRecord))
    assert "no better than without" in capsys.readouterr().out
    steps = [(step.block, step.nll) for step in history.all(StepRecord)]
    assert steps == [(step.block, step.nll) for step in read_history(without / "ledger.jsonl").all(StepRecord)]


def test_a_refit_every_two_removals(search: Search) -> None:
    history = read_history(search(num_remove=5, compensate_every=2) / "ledger.jsonl")
    assert [record.step for record in history.all(CompensationRecord)] == [2, 4]


def test_an_audit_scores_with_the_weights_of_its_step(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    run = search(strategy="lazy", audit=3)
    history = read_history(run / "ledger.jsonl")
    for step in (1, 2, 3):
        of_step, of_audit = (history.sums(phase).sums for phase in (step, -step))
        shared = [mask for mask in of_step if len(of_step[mask]) == NUM_SCORED]
        assert shared
        assert all(of_step[mask] == of_audit[mask] for mask in shared)


def test_a_model_in_memory_is_as_it_was_afterwards(trained_folder: Path, text: Path) -> None:
    model, tokenizer = bp.load(trained_folder, dtype="float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    windows = bp.calibration(text, tokenizer, num_samples=40, seq_len=16, num_windows=16)
    logits = model(windows.tokens).logits
    found = bp.search(model, windows, num_remove=2, compensate=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(windows.tokens).logits, logits)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert len(found.order) == 2


def test_what_prune_writes_of_such_a_run_does_not_claim_its_perplexities(
    search: Search, trained_folder: Path, tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    pruning = PruneConfig.of(model=str(trained_folder), run=search())
    prune_model(pruning, tmp_path / "out", reporter)
    assert "its perplexities are of those; use `compensate`" in capsys.readouterr().out
    assert "pruned" not in json.loads((tmp_path / "out" / "blockpruner.json").read_text())
    assert load(tmp_path / "out").config.num_hidden_layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "evolution"}, "expected `compensate` with `strategy=greedy` or `strategy=lazy`"),
        ({"metric": "kl"}, "expected `compensate` with `metric=ppl`"),
        ({"compensate": False}, "expected `compensate_windows` with `compensate`"),
        ({"compensate_windows": 32}, "expected fewer than the 32 calibration windows"),
    ],
)
def test_what_cannot_be_refitted_is_refused(search: Search, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(**options)


def test_run_json_and_the_report_list_the_refits(search: Search, tmp_path: Path, reporter: Reporter) -> None:
    run = search(num_remove=4, compensate_every=2)
    refits = json.loads((run / "run.json").read_text())["refits"]
    assert [(refit["step"], refit["num_tokens"], refit["is_used"]) for refit in refits] == [
        (2, NUM_FITTED * 16, True), (4, NUM_FITTED * 16, True),
    ]  # fmt: skip
    calls.report([run], tmp_path / "report", reporter)
    text = (tmp_path / "report" / "report.html").read_text()
    assert f"2 on 384 tokens, 2 of them used; perplexity {refits[1]['perplexity']:.4f} after that of step 4" in text


def test_a_run_does_not_go_on_with_other_refits(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    run = search()
    for file in (run / "refits").iterdir():
        file.unlink()
    with monkeypatch.context() as patched:
        patched.setattr("blockpruner.searching.fits.IN_SEARCH_RIDGE", 0.3)
        with pytest.raises(UserError, match="the refit after step 3 gives other weights than when"):
            search(num_remove=4)
    with pytest.raises(UserError, match="`compensate_every` was 1, now 2"):
        search(num_remove=4, compensate_every=2)
