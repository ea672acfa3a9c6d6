"""One command a table; options that all tables share come first.

python -m benchmarks.paper --calibration alpaca --perplexity wikitext2 --out tables main --ratio 0.2 --tasks paper
python -m benchmarks.paper --calibration alpaca --perplexity wikitext2 --out tables draws --seed 42 --seed 7

Table 7 is `python -m benchmarks.pruning_time`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from benchmarks.paper import ablation, draws, granularity, main_table, metric, more_tasks, speed
from benchmarks.paper.setting import Setting
from blockpruner.cli.app import errors_in_one_line
from blockpruner.comparing.config import CompareConfig


class Tables(TyperGroup):
    """Ends as the commands do."""

    def invoke(self, ctx: Any) -> Any:
        with errors_in_one_line(resumable=True):
            return super().invoke(ctx)


app = typer.Typer(cls=Tables, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Ratios = Annotated[list[float], typer.Option(help="Share of the parameters to remove; may be repeated.")]
Ratio = Annotated[float, typer.Option(help="Share of the parameters to remove.")]
Tasks = Annotated[str, typer.Option(help="As for `blockpruner evaluate`; empty for perplexity only.")]


@app.callback()
def shared(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the results; each method runs once for all tables.")],
    model: str = "smollm2",
    calibration: str = "alpaca",
    seq_len: int = 64,
    num_windows: int = 32,
    seed: int = 42,
    strategy: str = "lazy",
    perplexity: Annotated[list[str], typer.Option(help="As for `blockpruner evaluate`.")] = ["wikitext2"],  # noqa: B006
    test_seq_len: int = 512,
    test_windows: int | None = 40,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files.")] = None,
    limit: int | None = None,
    replicas: int | None = None,
) -> None:
    """The paper's tables on a model of one's own."""
    common = CompareConfig.of(
        model=model, calibration=calibration, seq_len=seq_len, num_windows=num_windows, seed=seed, strategy=strategy,
        replicas=replicas, threads_per_replica=1, perplexity=tuple(perplexity), test_seq_len=test_seq_len,
        test_windows=test_windows,
    )  # fmt: skip
    context.obj = Setting(common=common, include_path=include_path, limit=limit, out=out)


@app.command("main")
def table_1(context: typer.Context, ratio: Ratios = [0.2], tasks: Tasks = "") -> None:  # noqa: B006
    """Table 1: five methods."""
    main_table.show(context.obj, tuple(ratio), _parts(tasks))


@app.command("ablation")
def table_2(context: typer.Context, ratio: Ratios = [0.2], tasks: Tasks = "") -> None:  # noqa: B006
    """Table 2: without search, without blocks."""
    ablation.show(context.obj, tuple(ratio), _parts(tasks))


@app.command("metric")
def table_4(context: typer.Context, ratio: Ratios = [0.2], tasks: Tasks = "") -> None:  # noqa: B006
    """Table 4: perplexity or JS divergence."""
    metric.show(context.obj, tuple(ratio), _parts(tasks))


@app.command("granularity")
def table_5(context: typer.Context, ratio: Ratios = [0.3], tasks: Tasks = "") -> None:  # noqa: B006
    """Table 5: blocks or layers."""
    granularity.show(context.obj, tuple(ratio), _parts(tasks))


@app.command("speed")
def table_6(context: typer.Context, ratio: Ratio = 0.25, repeats: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """Table 6: generation."""
    speed.show(context.obj, ratio, repeats)


@app.command("aqua")
def table_8(context: typer.Context, ratio: Ratio = 0.25, tasks: Tasks = "paper-aqua") -> None:
    """Table 8: AQuA-RAT."""
    more_tasks.show_aqua(context.obj, ratio, _parts(tasks))


@app.command("nine-tasks")
def table_10(context: typer.Context, ratio: Ratio = 0.25, tasks: Tasks = "paper,paper-more") -> None:
    """Table 10: nine tasks."""
    more_tasks.show_nine(context.obj, ratio, _parts(tasks))


@app.command("draws")
def several_draws(
    context: typer.Context,
    ratio: Ratio = 0.25,
    methods: str = "slicegpt,laco-code,rm,shortgpt,layer",
    seed: Annotated[list[int], typer.Option(help="Seed of a calibration draw; may be repeated.")] = [42, 7, 3],  # noqa: B006
    tasks: Tasks = "",
) -> None:
    """Table 1 at one ratio with several calibration draws and paired intervals."""
    draws.show(context.obj, ratio, _parts(methods), tuple(seed), _parts(tasks))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


if __name__ == "__main__":
    app()
