"""How fast a model generates, and its memory; a pruned checkpoint beside the dense model, in turn."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_provenance
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.latency import Measured, Workload, generate_in_turn
from blockpruner.engine.model.architectures import PRUNED_PREFIX
from blockpruner.engine.model.loading import (
    ModelSource,
    check_positions,
    load_config,
    materialize,
    meta_model,
    resolve_device,
    resolve_dtype,
)
from blockpruner.showing.console import Reporter
from blockpruner.showing.measurements import tabulate_speeds
from blockpruner.timing.model_process import model_process


def measure_latency(
    model: str,
    reporter: Reporter,
    *,
    workload: Workload,
    repeats: int = 20,
    dense: str | None = None,
    no_dense: bool = False,
    threads: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Returns what `latency --json` prints.

    dense: the model that a pruned checkpoint was made from, in place of the recorded one; threads: None for all.
    """
    place = resolve_device(device)
    source = ModelSource(model, revision, trust_remote_code)
    dtype, reason = resolve_dtype(dtype, source, place)
    source = materialize(source, dtype, reporter.say)
    sources = _sources(source, dtype, reporter, dense=dense, no_dense=no_dense)
    for one in sources.values():
        check_workload(one, workload)
    threads = threads or local_cpus()
    cache = "static" if workload.static_cache else "dynamic"
    reporter.say(
        f"{' and '.join(sources)} on {place} in {dtype} ({reason}), {threads} CPU threads: {workload.num_tokens} "
        f"tokens after a prompt of {workload.prompt_len}, batch size {workload.batch_size}, {cache} KV cache; "
        f"{repeats} repeats after a warm-up"
    )
    with ExitStack() as stack:
        processes = [
            stack.enter_context(model_process(one, dtype, place, threads, workload)) for one in sources.values()
        ]
        for process in processes:
            process.wait_until_loaded()
        with reporter.bar("generating", total=(repeats + 1) * len(processes)):

            def tell() -> None:
                reporter.advance(1)
                if reporter.done == len(processes):
                    reporter.say(f"loaded and warmed up; done in about {reporter.eta}")

            rounds = generate_in_turn([process.generate for process in processes], repeats, tell)
        measured = {
            name: Measured(of_model, process.memory())
            for name, of_model, process in zip(sources, rounds, processes, strict=True)
        }
    result = {name: one.summary() for name, one in measured.items()}
    if len(measured) == 2:
        result["ratio"] = measured["pruned"].relative_to(measured["dense"])
    _print_table(result, reporter)
    asked = {
        "model": model,
        "dense": dense,
        "no_dense": no_dense,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    setting = {"device": str(place), "dtype": dtype, "threads": threads, "repeats": repeats, **vars(workload), **asked}
    return {**result, "setting": setting}


def _sources(
    source: ModelSource, dtype: str, reporter: Reporter, *, dense: str | None, no_dense: bool
) -> dict[str, ModelSource]:
    """What to measure, by `dense` and `pruned`."""
    if dense is not None and no_dense:
        raise UserError("expected either --dense MODEL or --no-dense, and not both.")
    is_pruned = load_config(source).model_type.startswith(PRUNED_PREFIX) or (Path(source.name) / SIDE_CAR).exists()
    if not is_pruned and (dense is not None or no_dense):
        raise UserError(
            f"expected a pruned checkpoint with --dense or --no-dense, got {source.name!r}, which is dense."
        )
    if not is_pruned:
        return {"dense": source}
    if no_dense:
        return {"pruned": source}
    return {"dense": _dense_source(source, dense, dtype, reporter), "pruned": source}


def _dense_source(pruned: ModelSource, name: str | None, dtype: str, reporter: Reporter) -> ModelSource:
    """The model that a checkpoint was pruned from: the recorded one, or one that the user names in its place. It must
    have the recorded number of parameters; its values make no difference to speed."""
    needed = {"blockpruner", "base_model", "num_parameters_dense"}
    try:
        provenance = read_provenance(pruned.name, pruned.revision)
        if missing := needed - provenance.keys():
            raise UserError(
                f"expected {', '.join(sorted(missing))} in the {SIDE_CAR} of {pruned.name!r}, which another version of "
                f"blockpruner wrote; prune again."
            )
        source = ModelSource(
            name or provenance["base_model"], None if name else provenance.get("revision"), pruned.trust_remote_code
        )
        source = materialize(source, dtype, reporter.say)
        num_parameters = sum(weight.numel() for weight in meta_model(source, dtype).parameters())
    except UserError as error:
        raise UserError(
            f"no dense model to compare with: {error} Name one with --dense MODEL, or measure {pruned.name!r} alone "
            f"with --no-dense."
        ) from error
    if num_parameters != provenance["num_parameters_dense"]:
        raise UserError(
            f"expected the model that {pruned.name!r} was made from, {provenance['base_model']!r} with "
            f"{provenance['num_parameters_dense']:,} parameters, got {source.name!r} with {num_parameters:,}; name it "
            f"with --dense MODEL, or use --no-dense."
        )
    if provenance["blockpruner"] != version("blockpruner"):
        reporter.say(f"note: pruned by blockpruner {provenance['blockpruner']}, this is {version('blockpruner')}")
    return source


def check_workload(source: ModelSource, workload: Workload) -> None:
    """Raise UserError if a generation is longer than the model's positions."""
    num_tokens = workload.prompt_len + workload.num_tokens
    check_positions(load_config(source), num_tokens, "--prompt-len and --num-tokens together")


def _print_table(result: dict[str, Any], reporter: Reporter) -> None:
    table = tabulate_speeds(result)
    grid = Table(*table.header, title=table.caption)
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in table.rows:
        grid.add_row(*row)
    reporter.console.print(grid)
