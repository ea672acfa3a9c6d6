"""Measures how fast a model generates, and its memory. A pruned checkpoint alternates with its dense model."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_provenance
from blockpruner.engine.checkpoint.provenance import check_another, check_base
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.latency import Measured, generate_in_turn
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.architectures import PRUNED_PREFIX
from blockpruner.engine.model.loading import (
    check_positions,
    check_tensors,
    load_config,
    materialize,
    meta_model,
    resolve_device,
    resolve_dtype,
)
from blockpruner.engine.sections import ModelSource
from blockpruner.showing.console import Reporter
from blockpruner.showing.measurements import tabulate_speeds
from blockpruner.showing.tables import numbers_table
from blockpruner.timing.config import LatencyConfig
from blockpruner.timing.model_process import model_process


def measure_latency(config: LatencyConfig, reporter: Reporter) -> dict[str, Any]:
    """Measure and return what `latency --json` prints."""
    place = resolve_device(config.device)
    workload, repeats = config.part(Workload), config.repeats
    dtype, reason = resolve_dtype(config.dtype, config.source, place)
    source = materialize(config.source, dtype, reporter.say)
    sources = _sources(source, dtype, reporter, dense=config.dense, no_dense=config.no_dense)
    for one in sources.values():
        check_workload(one, workload)
        for note in check_tensors(meta_model(one, dtype), one):
            reporter.say(f"note: {note}")
    threads = config.threads or local_cpus()
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
                    reporter.say(f"loaded and warmed up; about {reporter.eta} left")

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
        "model": config.model,
        "dense": config.dense,
        "no_dense": config.no_dense,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    workload_values = workload.to_json()
    setting = {
        "device": str(place), "dtype": dtype, "threads": threads, "repeats": repeats, **workload_values, **asked,
    }  # fmt: skip
    return {**result, "setting": setting}


def _sources(
    source: ModelSource, dtype: str, reporter: Reporter, *, dense: str | None, no_dense: bool
) -> dict[str, ModelSource]:
    """Return the models to measure, with the keys `dense` and `pruned`."""
    is_pruned = load_config(source).model_type.startswith(PRUNED_PREFIX) or (Path(source.name) / SIDE_CAR).exists()
    if not is_pruned and (dense is not None or no_dense):
        raise UserError(
            f"expected a pruned checkpoint with `dense` or `no_dense`, got {source.name!r}, which is dense."
        )
    if not is_pruned:
        return {"dense": source}
    if no_dense:
        return {"pruned": source}
    return {"dense": _dense_source(source, dense, dtype, reporter), "pruned": source}


def _dense_source(pruned: ModelSource, name: str | None, dtype: str, reporter: Reporter) -> ModelSource:
    """Return the model that a checkpoint was pruned from: the recorded one, with the recorded weights, or the one that
    the user named, with as many parameters.

    The values of parameters do not affect speed, so a named one may be in another dtype.
    """
    needed = {"blockpruner", "base_model", "num_parameters_dense"}
    try:
        provenance = read_provenance(pruned.name, pruned.revision)
        if missing := needed - provenance.keys():
            raise UserError(
                f"expected {', '.join(sorted(missing))} in the {SIDE_CAR} of {pruned.name!r}, which was written by "
                f"another version of blockpruner; prune again."
            )
        source = ModelSource(
            name or provenance["base_model"], None if name else provenance.get("revision"), pruned.trust_remote_code
        )
        if name is None:
            check_base(provenance, source)
        elif told := check_another(provenance, source):
            reporter.say(f"note: {told}; its speed is that of its sizes")
        source = materialize(source, dtype, reporter.say)
        num_parameters = sum(weight.numel() for weight in meta_model(source, dtype).parameters())
    except UserError as error:
        raise UserError(
            f"no dense model to compare with: {error} Set one with `dense`, or measure {pruned.name!r} alone "
            f"with `no_dense`."
        ) from error
    if num_parameters != provenance["num_parameters_dense"]:
        raise UserError(
            f"expected the model that {pruned.name!r} was made from, {provenance['base_model']!r} with "
            f"{provenance['num_parameters_dense']:,} parameters, got {source.name!r} with {num_parameters:,}; set it "
            f"with `dense`, or use `no_dense`."
        )
    if provenance["blockpruner"] != version("blockpruner"):
        reporter.say(f"note: pruned by blockpruner {provenance['blockpruner']}, this is {version('blockpruner')}")
    return source


def check_workload(source: ModelSource, workload: Workload) -> None:
    """Raise UserError if a generation exceeds the maximum number of positions of the model."""
    num_tokens = workload.prompt_len + workload.num_tokens
    check_positions(load_config(source), num_tokens, "`prompt_len` and `num_tokens` together")


def _print_table(result: dict[str, Any], reporter: Reporter) -> None:
    table = tabulate_speeds(result)
    grid = numbers_table(*table.header, title=table.caption)
    for row in table.rows:
        grid.add_row(*row)
    reporter.console.print(grid)
