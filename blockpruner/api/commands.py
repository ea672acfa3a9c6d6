"""What the commands of the same names do. Most run models in processes of their own, so they take names and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.api.models import Model, as_it_was, name_of
from blockpruner.api.printing import printing
from blockpruner.api.texts import Text, texts_of
from blockpruner.comparing.config import CompareConfig
from blockpruner.compensating.config import CompensateConfig
from blockpruner.engine.errors import UserError
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.exporting.config import ExportConfig
from blockpruner.planning.config import PlanConfig
from blockpruner.recovering.config import RecoverConfig
from blockpruner.reporting.config import ReportConfig
from blockpruner.sampling.config import SampleConfig
from blockpruner.shrinking.config import ShrinkConfig
from blockpruner.timing.config import LatencyConfig
from blockpruner.timing.times_config import TimesConfig

Result = dict[str, Any]
"""What the command of the same name prints with `--json`."""


def compensate_folder(folder: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Compensate a checkpoint that `prune` wrote, on as many replicas as fit. The same call resumes what was stopped.

    options: those of `blockpruner compensate`, such as calibration="alpaca", seq_len=512, perplexity=("wikitext2",).
    """
    from blockpruner.compensating.compensating import compensate_checkpoint

    with printing(verbose) as reporter:
        config = CompensateConfig.of(folder=Path(_named(folder)), **options)
        return compensate_checkpoint(config, Path(out), reporter)


def evaluate(
    model: Model,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    verbose: bool = False,
    **options: Any,
) -> Result:
    """Task scores of lm-eval, and perplexity.

    model: in memory, with its tokenizer, then it is judged in this process; or a name. options: those of
    `blockpruner evaluate`, such as tasks=("piqa",), limit=100, perplexity=("wikitext2",), run="run".
    """
    from blockpruner.evaluating.evaluating import GivenModel, evaluate_model

    live = model if isinstance(model, PreTrainedModel) else None
    given = None
    if live is not None:
        if tokenizer is None:
            raise UserError("expected `tokenizer` beside a model in memory.")
        if out is not None or options.get("run") is not None:
            raise UserError("expected the name of a model with `out` or `run`, got a model in memory.")
        given = GivenModel(live, tokenizer)
        options = {**options, "no_ray": True}
    config = EvaluationConfig.of(model=name_of(live) if live is not None else str(model), **options)
    with printing(verbose) as reporter, as_it_was(live):
        return evaluate_model(config, reporter, out=None if out is None else Path(out), given=given)


def compare(model: str | Path, text: Text, *, out: str | Path, verbose: bool = False, **options: Any) -> Result:
    """Run several pruning methods on one model and calibration text, and compare what they leave.

    out: folder for all results; the same call goes on from there. options: those of `blockpruner compare`, such as
    methods=("blockpruner", "shortgpt"), ratio=(0.2,), perplexity=("wikitext2",).
    """
    from blockpruner.comparing.comparing import compare_methods

    with printing(verbose) as reporter:
        config = CompareConfig.of(model=_named(model), calibration=texts_of(text), **options)
        return compare_methods(config, Path(out), reporter)


def shrink(model: str | Path, text: Text, *, out: str | Path, verbose: bool = False, **options: Any) -> Result:
    """The whole way from a model to a smaller one in `out / "model"`: search, prune, compensate, evaluate, measure the
    speed, report, export. The same call resumes what was stopped.

    options: those of `blockpruner shrink`, such as ratio=0.2, max_perplexity_increase=0.2, export=("deci",).
    """
    from blockpruner.shrinking.shrinking import shrink_model

    with printing(verbose) as reporter:
        config = ShrinkConfig.of(model=_named(model), calibration=texts_of(text), **options)
        return shrink_model(config, Path(out), reporter)


def plan(model: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Placement, memory and time of a search, from the model's config alone.

    options: those of `blockpruner plan`: a search's own, and gpus="2x24GB", nodes, tflops, measure.
    """
    from blockpruner.planning.planning import plan_search

    with printing(verbose) as reporter:
        return plan_search(PlanConfig.of(model=_named(model), **options), reporter)


def sample(model: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Let a model write calibration text to a new .jsonl file.

    options: those of `blockpruner sample`, such as num_rows=96, num_tokens=256, start="<|endoftext|>".
    """
    from blockpruner.sampling.sampling import sample_text

    with printing(verbose) as reporter:
        return sample_text(SampleConfig.of(model=_named(model), **options), Path(out), reporter)


def latency(model: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """How fast a model generates, and its memory; a pruned checkpoint beside its dense model.

    options: those of `blockpruner latency`, such as repeats=20, prompt_len=512, num_tokens=128.
    """
    from blockpruner.timing.timing import measure_latency

    with printing(verbose) as reporter:
        return measure_latency(LatencyConfig(model=_named(model), **options), reporter)


def times(model: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """What removing each block, and parts of it, saves in time on this device: the table for `search` with
    budget_ms=12, times=out.

    options: those of `blockpruner times`, such as prompt_len=512, num_tokens=64, repeats=5, threads=1, run="run".
    """
    from blockpruner.timing.block_times import measure_times

    with printing(verbose) as reporter:
        return measure_times(TimesConfig.of(model=_named(model), **options), Path(out), reporter)


def export(folder: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Write a pruned checkpoint in the form that a runtime loads.

    options: those of `blockpruner export`, such as format="gguf", base="model.gguf".
    """
    from blockpruner.exporting.exporting import export_model

    with printing(verbose) as reporter:
        return export_model(ExportConfig.of(folder=Path(_named(folder)), **options), Path(out), reporter)


def recover(folder: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Train LoRA adapters for a pruned checkpoint, and merge them. The same call resumes what was stopped.

    options: those of `blockpruner recover`, such as data="alpaca", num_rows=8000, perplexity=("rest",).
    """
    from blockpruner.recovering.recovering import recover_model

    with printing(verbose) as reporter:
        return recover_model(RecoverConfig.of(folder=Path(_named(folder)), **options), Path(out), reporter)


def report(
    runs: str | Path | Sequence[str | Path], *, out: str | Path | None = None, verbose: bool = False, **options: Any
) -> Result:
    """Draw a run, or several runs of one model over each other, as pictures and one HTML page.

    options: those of `blockpruner report`, such as influence=True.
    """
    from blockpruner.reporting.writing import write_report

    several = [runs] if isinstance(runs, str | Path) else runs
    with printing(verbose) as reporter:
        return write_report(ReportConfig.of(runs=tuple(several), out=out, **options), reporter)


def _named(model: Any) -> str:
    if isinstance(model, PreTrainedModel):
        raise UserError("expected the name or the folder of a model, got a model in memory; `save` it first.")
    return str(model)
