"""The application's functions, with the options of their configs spelled out."""

from pathlib import Path
from typing import Any

from blockpruner.comparing.config import CompareConfig
from blockpruner.compensating.compensating import compensate_checkpoint
from blockpruner.compensating.config import CompensateConfig
from blockpruner.exporting.config import ExportConfig
from blockpruner.exporting.exporting import export_model
from blockpruner.planning.config import PlanConfig
from blockpruner.planning.planning import plan_search
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.recovering.config import RecoverConfig
from blockpruner.recovering.recovering import recover_model
from blockpruner.reporting.config import ReportConfig
from blockpruner.reporting.writing import write_report
from blockpruner.serving.config import ServeCheckConfig
from blockpruner.serving.serve_check import check_serving
from blockpruner.showing.console import Reporter
from blockpruner.timing.config import LatencyConfig
from blockpruner.timing.timing import measure_latency


def compare_config(model: Path, text: Path, **options: Any) -> CompareConfig:
    """A comparison in this process that takes seconds."""
    return CompareConfig.of(
        model=str(model), calibration=str(text), num_samples=20, seq_len=16, num_windows=3, dtype="float32",
        device="cpu", no_ray=True, threads_per_replica=1, perplexity=(str(text),), test_seq_len=16, test_windows=4,
        repeats=0, **options,
    )  # fmt: skip


def prune_to(out: Path, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return prune_model(PruneConfig.of(**options), out, reporter)


def report(runs: list[Path], out: Path | None, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return write_report(ReportConfig.of(runs=tuple(runs), out=out, **options), reporter)


def export(folder: Path, out: Path, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return export_model(ExportConfig.of(folder=folder, **options), out, reporter)


def serve_check(folder: Path, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return check_serving(ServeCheckConfig.of(folder=folder, **options), reporter)


def latency(reporter: Reporter, **options: Any) -> dict[str, Any]:
    return measure_latency(LatencyConfig.of(**options), reporter)


def recover(out: Path, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return recover_model(RecoverConfig.of(**options), out, reporter)


def compensate(out: Path, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return compensate_checkpoint(CompensateConfig.of(**options), out, reporter)


def plan(reporter: Reporter, **options: Any) -> dict[str, Any]:
    return plan_search(PlanConfig.of(**options), reporter)
