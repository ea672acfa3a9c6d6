"""What the studies share: searches that differ in one option, evaluated on held-out text and questions.

Searches and evaluations resume from their folders, so a study can be interrupted, and the picture of a finished one is
drawn again within seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet
import typer
from scipy import stats

from benchmarks.common import console
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.tasks import score_metric
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.content import RunSummary
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter

HeldOut = Annotated[list[str], typer.Option(help="As --perplexity of evaluate.")]
Out = Annotated[Path, typer.Option(help="Folder for runs, evaluations and the picture.")]
Tasks = Annotated[str, typer.Option(help="As for evaluate.")]
IncludePath = Annotated[Path | None, typer.Option(help="As for evaluate.")]
Limit = Annotated[int | None, typer.Option(help="As for evaluate.")]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Held-out texts and tasks, and the numbers of removals to evaluate."""

    held_out: list[str]
    """Texts for perplexity."""
    tasks: str = ""
    """As `--tasks` of evaluate."""
    include_path: Path | None = None
    limit: int | None = None
    seq_len: int = 256
    num_windows: int = 32
    batch_size: int = 8


@dataclass(frozen=True)
class Variant:
    """A search of a study."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of `SearchConfig.of`."""


@dataclass(frozen=True)
class Judged:
    variant: Variant
    search: RunSummary
    """run.json."""
    rows: list[dict[str, Any]]
    """Of evaluation.json: one for each number of removals."""
    samples: list[dict[str, Any]]
    """The scores of every question and window at the last number of removals."""


def judge_searches(
    variants: list[Variant], common: dict[str, Any], judge: Judge, num_remove: list[int], out: Path, *, replicas: int
) -> list[Judged]:
    """Run and evaluate each variant. num_remove: numbers of removals to evaluate; those that a search does not reach
    are left out, and its last one is always included. The dense model is evaluated first, and its row comes first."""
    if len({variant.name for variant in variants}) < len(variants):
        raise UserError(f"expected variants with different names, got {', '.join(v.name for v in variants)}.")
    configs = [SearchConfig.of(**{**common, "replicas": replicas, **variant.options}) for variant in variants]
    evaluation = EvaluationConfig(
        model=common["model"], perplexity=tuple(judge.held_out), seq_len=(judge.seq_len,),
        num_windows=judge.num_windows, tasks=tuple(filter(None, judge.tasks.split(","))),
        include_path=judge.include_path, limit=judge.limit, batch_size=judge.batch_size, replicas=replicas,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    folders = [out / "evaluations" / variant.name.replace(" ", "-") for variant in variants]
    # A wrong text or task is found before hours of search. The first variant's folder has the answers for later.
    console.print("dense", style="bold")
    dense = evaluation.replace(
        model=configs[0].model, dtype=configs[0].dtype, device=configs[0].device,
        threads_per_replica=configs[0].threads_per_replica,
    )  # fmt: skip
    evaluate_model(dense, Reporter(console), out=folders[0])
    judged: list[Judged] = []
    for variant, config, folder in zip(variants, configs, folders, strict=True):
        console.print(f"{variant.name}", style="bold", highlight=False)
        run = out / "runs" / variant.name.replace(" ", "-")
        summary = run_search(config, run, Reporter(console))
        steps = len(summary["steps"])
        at = tuple(sorted({steps, *(number for number in num_remove if 0 < number < steps)}))
        at = at if judged else (0, *at)
        mine = evaluation.replace(
            model=config.model, run=run, num_remove=at, dtype=summary["dtype"],
            device=config.device, threads_per_replica=config.threads_per_replica,
        )  # fmt: skip
        found = evaluate_model(mine, Reporter(console), out=folder)
        samples = pyarrow.parquet.read_table(folder / "samples.parquet").to_pylist()
        last = [sample for sample in samples if sample["num_remove"] == steps]
        rows = [*judged[0].rows[:1], *found["rows"]] if judged else found["rows"]
        judged.append(Judged(variant, summary, rows, last))
    return judged


def paired(one: Judged, other: Judged, name: str) -> dict[str, Any]:
    """Test whether two masks differ on a text or a task by more than the spread of its windows or questions explains.

    Windows: mean difference of the NLL in nats (other - one) and Wilcoxon's signed-rank test. Questions: difference of
    the accuracy (`acc_norm` where there is one) and the exact sign test on the questions that only one of the two
    answers correctly.
    """
    mine, theirs = (_values(judged, name) for judged in (one, other))
    differences = [after - before for before, after in zip(mine, theirs, strict=True)]
    changed = [difference for difference in differences if difference]
    if not changed:
        p_value = 1.0
    elif all(abs(difference) == 1 for difference in changed):
        p_value = float(stats.binomtest(sum(d > 0 for d in changed), len(changed)).pvalue)
    else:
        p_value = float(stats.wilcoxon(changed).pvalue)
    return {
        "on": name, "one": one.variant.name, "other": other.variant.name,
        "difference": sum(differences) / len(differences), "p_value": p_value,
    }  # fmt: skip


def all_pairs(judged: list[Judged], names: list[str]) -> list[dict[str, Any]]:
    return [paired(one, other, name) for name in with_samples(judged, names) for one, other in combinations(judged, 2)]


def with_samples(judged: list[Judged], names: list[str]) -> list[str]:
    """Return the tasks that `paired` can compare, and print those that it leaves out: a group has a score, but the
    questions belong to its members."""
    return _all_but(names, {name for name in names if not all(_values(found, name) for found in judged)},
                    "not compared question by question, since these have none of their own")  # fmt: skip


def _values(judged: Judged, name: str) -> list[float]:
    mine = [sample for sample in judged.samples if sample["task"] == name]
    metrics = {sample["metric"] for sample in mine}
    metric = "nll" if "nll" in metrics else score_metric(metrics)
    return [sample["value"] for sample in mine if sample["metric"] == metric]


def score_columns(judged: list[Judged]) -> tuple[list[str], list[str]]:
    """Return the names of the texts, and of the tasks that have a score and its standard error in every row. Prints
    those that do not, such as WikiText as a task, which is not scored by correct answers."""
    rows = [row for found in judged for row in found.rows]
    tasks = list(rows[0]["tasks"])
    unscored = {task for task in tasks if not all(_is_scored(row["tasks"][task]) for row in rows)}
    return list(rows[0]["perplexity"]), _all_but(tasks, unscored, "left out, since a score or its error is missing")


def _is_scored(values: dict[str, Any]) -> bool:
    return all(values[key] is not None and math.isfinite(values[key]) for key in ("score", "stderr"))


def _all_but(names: list[str], left_out: set[str], reason: str) -> list[str]:
    if left_out:
        console.print(f"{reason}: {', '.join(name for name in names if name in left_out)}", highlight=False)
    return [name for name in names if name not in left_out]


def cells(row: dict[str, Any], texts: list[str], tasks: list[str]) -> list[Any]:
    """Return a row of an evaluation for a table. texts, tasks: from `score_columns`."""
    return [
        f"{100 * row['ratio']:.1f}",
        *(f"{row['perplexity'][text]['value']:.2f} ± {row['perplexity'][text]['stderr'] or 0:.2f}" for text in texts),
        *(f"{100 * row['tasks'][task]['score']:.1f} ± {100 * row['tasks'][task]['stderr']:.1f}" for task in tasks),
    ]


def headings(texts: list[str], tasks: list[str]) -> list[str]:
    return ["removed (%)", *(f"PPL {Path(text).stem}" for text in texts), *tasks]
