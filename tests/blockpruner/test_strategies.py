"""Every strategy and metric through a whole run: the same result in one go, cut anywhere and resumed, on replicas."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.js import Js
from blockpruner.engine.metrics.kl import Kl
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.loading import load_tokenizer
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.sections import Calibration
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.sequence import read_official_sequence
from blockpruner.showing.console import Reporter
from tests.calls import prune_to, report
from tests.conftest import load
from tests.processes import command, finish

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "lazy": {"strategy": "lazy", "audit": 2},
    "tolerant": {"strategy": "lazy", "tolerance": "1se"},
    "one-shot": {"strategy": "one-shot"},
    "evolution": {"strategy": "evolution", "generations": 2, "offspring": 4},
    "kl": {"metric": Kl()},
    "js lazily": {"metric": Js(), "strategy": "lazy"},
    "per parameter": {"per": "params", "strategy": "lazy", "max_mha": 2, "keep": ("mlp.0",)},
    "evolution of groups": {
        "strategy": "evolution", "generations": 2, "offspring": 4, "units": "all", "num_remove": None, "ratio": 0.08,
    },
    "by ratio": {"strategy": "evolution", "generations": 2, "offspring": 4, "num_remove": None, "ratio": 0.2},
    "multipruner": {"strategy": "multipruner", "units": "all", "num_remove": None, "ratio": 0.3},
}  # fmt: skip


@pytest.fixture
def config(config: Callable[..., SearchConfig]) -> Callable[..., SearchConfig]:
    return lambda **options: config(**{"num_remove": 3, **options})


def facts(summary: dict[str, Any]) -> Any:
    """What must not depend on where and in how many sessions a run was done."""
    spent = {"wall_s", "num_replicas", "num_lost", "placement", "work_flops"}
    lines = [*summary["steps"], *summary.get("rounds", []), *summary.get("audit", {}).get("steps", [])]
    return summary["dense"], [{key: value for key, value in line.items() if key not in spent} for line in lines]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_that_is_cut_anywhere_and_resumed_ends_the_same(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, name: str
) -> None:
    asked = config(no_ray=True, **STRATEGIES[name])
    whole = run_search(asked, tmp_path / "whole", reporter)
    assert whole["status"] == "finished"
    lines = (tmp_path / "whole" / "ledger.jsonl").read_text().splitlines(keepends=True)
    for number in {1, 2, *range(3, len(lines), max(1, len(lines) // 4)), len(lines) - 1}:
        cut = tmp_path / f"cut {number}"
        cut.mkdir()
        (cut / "ledger.jsonl").write_text("".join(lines[:number]))
        assert facts(run_search(asked, cut, reporter)) == facts(whole)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ("--strategy", "evolution", "--generations", "2", "--offspring", "4"),
            id="evolution",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--strategy", "evolution", "--generations", "2", "--offspring", "4", "--units", "channels"),
            id="evolution of channels",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--strategy", "lazy", "--metric", "js"), id="js lazily", marks=pytest.mark.slow),
    ],
)
def test_on_two_replicas_the_result_is_the_same(slow_model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    options = (*options, "--num-windows", "8")
    alone = finish(command(slow_model, tmp_path / "alone", "--no-ray", *options))
    together = finish(command(slow_model, tmp_path / "together", "--replicas", "2", *options))
    assert facts(together) == facts(alone)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_run_holds_fits_together(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, name: str
) -> None:
    out = tmp_path / "run"
    summary = run_search(config(no_ray=True, **STRATEGIES[name]), out, reporter)
    on_disk = json.loads((out / "run.json").read_text())
    assert on_disk["steps"] == json.loads(json.dumps(summary["steps"]))
    blocks = [Block.from_json(step["block"]) for step in summary["steps"]]
    assert Mask.of(read_official_sequence(out / "sequence.json")) == Mask.of(blocks)
    last = summary["steps"][-1]
    assert [step["step"] for step in summary["steps"]] == list(range(1, len(blocks) + 1))
    for key, total in summary["totals"].items():
        assert total == pytest.approx(sum(step[key] for step in summary["steps"]))
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    final = [row for row in scores if row["mask"] == str(Mask.of(blocks)) and row["exact"]]
    value = {"kl": "kl", "js lazily": "js"}.get(name, "nll")
    assert final[0][value] == last[value] is not None
    assert final[0]["num_windows"] == summary["calibration"]["num_windows"]
    assert all(row["num_windows"] < summary["calibration"]["num_windows"] for row in scores if not row["exact"])
    pruned = prune_to(tmp_path / "model", reporter, model=summary["model"], run=out)
    assert pruned["ratio"] == pytest.approx(last["ratio"])
    assert all(Path(path).stat().st_size > 0 for path in report([out], None, reporter)["pictures"])


@pytest.mark.parametrize("metric", [Kl(), Js()])
def test_a_divergence_is_that_of_the_whole_distributions(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, tiny_folder: Path, metric: Metric
) -> None:
    asked = config(no_ray=True, metric=metric)
    summary = run_search(asked, tmp_path, reporter)
    model = load(tiny_folder)
    windows = calibration_windows(
        Calibration(calibration=asked.calibration, num_samples=20, seq_len=16, seed=42, text_column="text"),
        load_tokenizer(asked.source),
    ).tokens

    def log_probs(mask: Mask) -> torch.Tensor:
        with torch.no_grad():
            logits = prune(model, mask)(input_ids=windows).logits if mask.absent else model(input_ids=windows).logits
        return F.log_softmax(logits[:, :-1].double(), dim=-1)

    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
        return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())

    p, q = log_probs(Mask()), log_probs(Mask.of([Block.from_json(summary["steps"][0]["block"])]))
    middle = ((p.exp() + q.exp()) / 2).log()
    expected = kl(p, q) if metric == Kl() else (kl(p, middle) + kl(q, middle)) / 2
    assert summary["steps"][0][metric.key] == pytest.approx(expected, rel=1e-4)
    assert summary["steps"][0]["nll"] is summary["dense"]["perplexity"] is None
    assert summary["steps"][0][metric.key] <= min(
        row[metric.key] for row in pq.read_table(tmp_path / "scores.parquet").to_pylist() if row["step"] == 1
    )


def test_a_guard_keeps_the_steps_before_it_and_can_be_raised(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    free = run_search(config(no_ray=True, num_remove=7), tmp_path / "free", reporter)
    perplexities = [step["perplexity"] for step in free["steps"]]
    number = next(n for n in range(2, 7) if perplexities[n] > max(perplexities[:n]))
    limit = math.nextafter(max(perplexities[:number]), math.inf)
    asked = {"no_ray": True, "num_remove": 7}
    guarded = run_search(config(max_perplexity=limit, **asked), tmp_path / "run", reporter)
    assert facts(guarded)[1] == facts(free)[1][:number]
    assert guarded["status"] == "finished"
    assert f"stopped after {number} removals: the next one exceeds perplexity {limit}" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing was removed"):
        run_search(config(max_perplexity=1.5, **asked), tmp_path / "low", reporter)
    raised = run_search(config(max_perplexity=1e9, **asked), tmp_path / "run", reporter)
    assert facts(raised) == facts(free)


@pytest.mark.parametrize("change", [{"strategy": "greedy"}, {"metric": "js"}, {"tolerance": "1se"}])
def test_a_run_of_another_strategy_is_not_resumed(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, change: dict[str, Any]
) -> None:
    run_search(config(no_ray=True, strategy="lazy", num_remove=1), tmp_path, reporter)
    with pytest.raises(UserError, match=f"`{next(iter(change))}` was"):
        run_search(config(no_ray=True, **{"strategy": "lazy", "num_remove": 1, **change}), tmp_path, reporter)


def test_the_target_of_a_search_for_whole_masks_cannot_grow(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    run_search(config(no_ray=True, strategy="evolution", generations=2, offspring=4), tmp_path, reporter)
    with pytest.raises(UserError, match="`num_remove` was 3, now 4"):
        run_search(
            config(no_ray=True, strategy="evolution", generations=2, offspring=4, num_remove=4), tmp_path, reporter
        )


def test_an_audit_can_be_asked_for_later(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    run_search(config(no_ray=True, strategy="lazy"), tmp_path, reporter)
    audited = run_search(config(no_ray=True, strategy="lazy", audit=3), tmp_path, reporter)["audit"]
    assert (audited["num_audited"], audited["num_agreed"]) == (3, 3)
    assert audited["most_misses"] == pytest.approx(1 - 0.05 ** (1 / 3))
    assert capsys.readouterr().out.count("greedy's choice") == 3


def test_an_audit_of_more_steps_than_a_ratio_takes_says_how_many_there_are(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = config(no_ray=True, strategy="lazy", num_remove=None, ratio=0.15, audit=50)
    found = run_search(wide, tmp_path, reporter)
    assert found["audit"]["num_audited"] == len(found["steps"])
    assert f"`audit=50` exceeds the {len(found['steps'])} steps" in capsys.readouterr().out
