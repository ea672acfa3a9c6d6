"""Runs a search: resolves the config, opens the run, runs the strategy and writes the result."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from blockpruner.cluster.session import interruptible, ray_session
from blockpruner.engine.blocks import Mask, removals_told
from blockpruner.engine.errors import UserError
from blockpruner.engine.search.oracle import Found
from blockpruner.searching.auditing import run_audit
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.content import RunSummary
from blockpruner.searching.header import check_calibration, check_config, check_times, identity_of
from blockpruner.searching.measuring import check_measurable, with_times
from blockpruner.searching.oracle import OnStep, RunOracle
from blockpruner.searching.records import ResultRecord, RoundRecord, StepRecord
from blockpruner.searching.resolving import NOTHING, Given, Job, identify, prepare
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.scores import KernelChanged, Scores
from blockpruner.searching.steps import block_of
from blockpruner.searching.summary import write_summary
from blockpruner.searching.telling import Telling
from blockpruner.showing.console import Reporter


def run_search(
    config: SearchConfig,
    out: Path,
    reporter: Reporter,
    *,
    given: Given = NOTHING,
    on_step: OnStep = lambda step: None,
) -> RunSummary:
    """Run a search, or resume the search in `out`. Returns the content of run.json.

    given: what the caller already has in memory. on_step: called after each removal, including those of an earlier
    session.

    Raises UserError for errors that the user can fix, SearchFailed if no candidate has a finite perplexity, and
    KeyboardInterrupt after SIGINT or SIGTERM. The run can be resumed afterwards.
    """
    with interruptible(), RunDirectory(out) as run, ExitStack() as stack:
        model = identify(config, given)
        check_config(config, model, run)
        check_measurable(config, run)
        if config.address is not None:
            stack.enter_context(ray_session(config.address))
        if run.header is not None:
            config = config.resumed(run.header.config)
        job = prepare(config, reporter, given, model)
        if job.windows.made_of is not None:
            config = config.replace(bos=job.windows.made_of.bos)
        check_calibration(job, run)
        if config.measures_times and run.header is None:
            config = config.replace(batch=config.workload.batch_size, context=config.workload.prompt_len)
        job = with_times(config, job, run, reporter)
        check_times(job, run)
        if run.header is not None:
            reporter.say(f"resuming {run.path} after {_progress(run)}")
            if (began := identity_of(run.header).name) != model.name:
                reporter.say(f"note: the run began with this model as {began!r}")
        telling = Telling(config, job, run, reporter)
        scores = Scores(config, job, run, telling, stack)
        oracle = RunOracle(config, job, run, scores, telling, on_step)
        try:
            with reporter.bar("search", 0.0):
                found = _search(config, job, oracle, scores)
                _check_found(config, job, run, oracle, found)
                _record_result(config, job, run, found)
                if job.space.times is not None:
                    telling.expected_time(job.space.times, found.mask)
                if not job.space.is_met(found.mask):
                    telling.note(
                        f"stopped after {len(found.blocks)} removals: the next one exceeds perplexity "
                        f"{config.max_perplexity}"
                    )
                if config.audit:
                    run_audit(config, job, run, scores, oracle, telling, found)
        except BaseException:
            if run.has_grown:  # a session that added nothing, such as a resume that is refused, changes nothing
                write_summary(run, config, job, "stopped")
            raise
        return write_summary(run, config, job, "finished")


def _search(config: SearchConfig, job: Job, oracle: RunOracle, scores: Scores) -> Found:
    while True:
        try:
            found = config.strategy.run(job.space, oracle, seed=config.seed)
            scores.restore_order()
            return found
        except KernelChanged:
            oracle.begin_again()


def _check_found(config: SearchConfig, job: Job, run: RunDirectory, oracle: RunOracle, found: Found) -> None:
    if oracle.num_phases < len(run.phases):
        removed = removals_told([block_of(step) for step in run.steps])
        raise UserError(
            f"{str(run.path)!r} has already removed {removed}; the target may grow but not shrink. "
            f"Use `blockpruner prune --num-remove K` to remove only the first K of them."
        )
    if not found.blocks:
        raise UserError(
            f"nothing was removed: the first removal already exceeds `max_perplexity` {config.max_perplexity}; use a "
            f"larger value."
        )


def _record_result(config: SearchConfig, job: Job, run: RunDirectory, found: Found) -> None:
    """Append a result record, if the step records do not lead to the mask that was found."""
    removed = [step.block for step in run.all(StepRecord)]
    blocks = [block.to_json() for block in found.blocks]
    is_told_by_steps = blocks == removed and not run.all(RoundRecord)
    if is_told_by_steps or run.all(ResultRecord):
        return
    unknown = dict.fromkeys(config.metric.recorded(0.0))
    steps = []
    for number, (block, score) in enumerate(zip(found.blocks, found.scores, strict=True), start=1):
        loss = config.metric.recorded(score.value) if score else unknown
        ratio = job.shape.ratio(Mask.of(found.blocks[:number]))
        steps.append({"block": block.to_json(), **loss, "ratio": ratio})
    run.append(ResultRecord.of(steps=steps))


def _progress(run: RunDirectory) -> str:
    rounds = run.all(RoundRecord)
    return rounds[-1].name if rounds else f"step {len(run.all(StepRecord))}"
