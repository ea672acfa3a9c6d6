"""Measures what blocks cost in time before a search that needs it and was given no table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from blockpruner.apart import run_apart
from blockpruner.cluster.nodes import default_threads
from blockpruner.cluster.options import PlacementChoice
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import is_there
from blockpruner.engine.judge.workload import REPEATS
from blockpruner.engine.model.full_memory import full_memory_ends
from blockpruner.engine.model.identity import Identity
from blockpruner.engine.model.loading import check_positions, load_config, load_model
from blockpruner.engine.options import different
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.times_file import TimesFile, read_times, times_of
from blockpruner.files import write_json
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.tables import Table, measure_table, read_table, setting_of
from blockpruner.showing.console import Reporter

TIMES_FILE = "times.json"
"""The table in the run directory, in the format of `times`."""


def check_measurable(config: SearchConfig, run: RunDirectory) -> None:
    """Raise UserError if a search must measure what blocks cost, but its replicas are not on one device here."""
    if not config.measures_times or run.header is not None:
        return
    elsewhere = {
        "`address`": config.address is not None,
        f"`placement={config.placement}`": config.placement in (PlacementChoice.STREAMED, PlacementChoice.SHARDED),
        "`gpus_per_replica`": (config.gpus_per_replica or 1) > 1,
    }
    if option := next((name for name, is_given in elsewhere.items() if is_given), None):
        raise UserError(
            f"expected `times` with {option}, since a search can only measure what blocks cost on one device of this "
            f"machine; run `blockpruner times` where the model will run, and give the table that it writes."
        )


def with_times(config: SearchConfig, job: Job, run: RunDirectory, reporter: Reporter) -> Job:
    """Return the job with the times of its blocks, if it needs them and has none: those that the run began with, those
    that an earlier attempt left in the run directory, or those that are measured now, before replicas open.

    Raises UserError if the run began without times, or if they do not suit the budget.
    """
    if not config.measures_times:
        return job
    header, file = run.header, run.path / TIMES_FILE
    if header is not None:
        if header.times is None:
            raise UserError(
                f"{str(run.path)!r} began without times of blocks, so they cannot count now; choose another `out`."
            )
        table = Table(times_of(header.times, job.shape, run.path / "ledger.jsonl"), header.times_setting or {})
        table.tell("times of the run", config.time_for, reporter)
    else:
        setting = setting_of(job.device, job.dtype, default_threads(config), REPEATS, config.workload)
        if _is_measured(file, job.identity, setting):
            reporter.say(f"what blocks cost was measured by an earlier attempt; delete {file} to measure it again")
        else:
            reporter.say("no `times` given, so what blocks cost is measured first")
            write_json(file, _measured(config, job, setting, reporter))
            reporter.say(f"the table is in {file}")
        table = read_table(file, job.identity, config.time_for, job.shape)
        table.tell(f"times of {file}", config.time_for, reporter)
    return replace(job, space=config.space(job.shape, table.times), times_setting=table.setting)


def _is_measured(file: Path, model: Identity, setting: Mapping[str, Any]) -> bool:
    """Whether an attempt that did not begin, such as one with a budget that cannot be met, measured the same.

    Raises UserError if there is another table, or one that is damaged.
    """
    if not is_there(file):
        return False
    try:
        found = read_times(file)
    except UserError as error:  # which says to measure again, as this search would if the file were not there
        raise UserError(f"{str(file)!r} cannot be read as a table of times; delete it to measure again.") from error
    measured = Identity(found["model"], found["fingerprint"])
    differences = "" if measured.is_same(model) else f"it is of {measured}"
    differences = differences or different(found["setting"], setting)
    if differences:
        raise UserError(
            f"{str(file)!r} holds another table than this search would measure: {differences}. Give it with `times`, "
            f"or delete it."
        )
    return True


def _measured(config: SearchConfig, job: Job, setting: Mapping[str, Any], reporter: Reporter) -> TimesFile:
    """Measure the caller's model where it is, and any other in a process that then gives all memory back."""
    num_tokens = config.workload.num_tokens
    model_config = load_config(job.model) if job.decoder is None else job.decoder.model.config
    check_positions(
        model_config, config.workload.prompt_len + num_tokens, f"`context` and {num_tokens} new tokens together"
    )
    if job.decoder is not None:
        return measure_table(job.decoder.model.eval(), job.identity, setting, reporter)
    quiet = reporter.console.quiet
    return run_apart(measure_named, job.model, job.identity, setting, quiet, reporter.translate).value


def measure_named(
    source: ModelSource, named: Identity, setting: Mapping[str, Any], quiet: bool, translate: Callable[[str], str]
) -> TimesFile:
    """Load a model and measure it. quiet: say nothing. translate: see `Reporter`."""
    with full_memory_ends(
        "while what blocks cost is measured", "use a smaller `dtype`, or give `times` that were measured elsewhere."
    ):
        model = load_model(source, setting["dtype"], setting["device"])
        return measure_table(model, named, setting, Reporter(Console(quiet=quiet), translate))
