"""The search: the strategy asks, the oracle answers, the ledger is written."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blockpruner.cluster.opening import Say
from blockpruner.cluster.session import interruptible, ray_session
from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.search.audit import audited_steps
from blockpruner.engine.search.oracle import Found, Strategy
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.units import KernelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.oracle import KernelChanged, RunOracle
from blockpruner.searching.replicas import Replicas, open_replicas
from blockpruner.searching.resolving import Job, prepare
from blockpruner.searching.run import RunDirectory, losses
from blockpruner.searching.summary import write_summary
from blockpruner.showing.console import Reporter


def run_search(config: SearchConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Search, or go on with the search that `out` holds. Returns run.json's content.

    Raises UserError for what the user can mend, SearchFailed when no candidate has a finite perplexity, and
    KeyboardInterrupt after SIGINT or SIGTERM; the run then can be resumed.
    """
    with interruptible(), RunDirectory(out) as run, ExitStack() as stack:
        if run.header is not None:
            _check_same_config(config, run)
        if config.address is not None:
            stack.enter_context(ray_session(config.address))
        job = prepare(config, reporter)
        if run.header is not None:
            _check_same_calibration(job, run)
            reporter.say(f"resuming {run.path} after {_progress(run)}")

        def opened(say: Say) -> Replicas:
            recorded = KernelShape(**run.kernel) if run.header else None
            replicas = stack.enter_context(open_replicas(config, job, recorded, say))
            if run.header is None:
                run.append("run", _header(config, job, replicas))
            return replicas

        space = config.space(job.shape)
        strategy = config.strategy_over(space)

        def flops_left(mask: Mask) -> float:
            return strategy.flops_left(mask, job.windows.seq_len)

        oracle = RunOracle(config, job, space, run, reporter, open_replicas=opened, flops_left=flops_left)
        try:
            with reporter.bar("search", 0.0):
                found = _search(config, space, strategy, oracle, run)
                if config.audit:
                    number = min(config.audit, len(found.blocks))
                    if number < config.audit:  # only now it is known how many steps a ratio takes
                        reporter.say(f"note: --audit {config.audit} of {number} steps: all of them")
                    oracle.audit(space, found, audited_steps(len(found.blocks), number, config.seed))
        except BaseException:
            if run.header is not None:
                write_summary(run, config, job, "stopped")
            raise
        return write_summary(run, config, job, "finished")


def _search(
    config: SearchConfig, space: SearchSpace, strategy: Strategy, oracle: RunOracle, run: RunDirectory
) -> Found:
    while True:
        try:
            found = strategy.run(oracle)
            break
        except KernelChanged:
            oracle.begin_again()
    if oracle.num_phases < len(run.phases):
        raise UserError(
            f"{str(run.path)!r} has removed {len(run.steps)} blocks already; the target may grow but not shrink. "
            f"`blockpruner prune --num-remove K` takes the first K of them."
        )
    if not found.blocks:
        raise UserError(
            f"expected --max-perplexity above that of the first removal, which has more than "
            f"{config.max_perplexity}; nothing was removed."
        )
    if not space.is_met(found.mask):
        oracle.say(f"stopped before perplexity {config.max_perplexity}: {len(found.blocks)} blocks are removed")
    removed = [step["block"] for step in run.of_type("step")]
    blocks = [block.to_json() for block in found.blocks]
    is_told_by_steps = blocks == removed and not run.of_type("round")
    if not is_told_by_steps and not run.of_type("result"):
        steps = []
        for number, (block, score) in enumerate(zip(found.blocks, found.scores, strict=True), start=1):
            loss = losses(score.value, config.metric) if score else dict.fromkeys(losses(0.0, config.metric))
            steps.append({"block": block.to_json(), **loss, "ratio": space.shape.ratio(Mask.of(found.blocks[:number]))})
        run.append("result", {"steps": steps})
    return found


def _progress(run: RunDirectory) -> str:
    rounds = run.of_type("round")
    return rounds[-1]["name"] if rounds else f"step {len(run.of_type('step'))}"


def _header(config: SearchConfig, job: Job, replicas: Replicas) -> dict[str, Any]:
    return {
        "config": config.to_json(),
        "dtype": job.dtype,
        "device": job.device,
        "kernel": replicas.kernel.to_json(),
        "placement": replicas.spec.placement,
        "calibration": _calibration(job.windows),
        "versions": {
            **{package: version(package) for package in ("blockpruner", "torch", "transformers", "ray")},
            "python": platform.python_version(),
        },
    }


def _calibration(windows: Windows) -> dict[str, Any]:
    return {
        "num_windows": windows.num_windows,
        "num_tokens": windows.tokens.numel(),
        "fingerprint": windows.fingerprint,
    }


def _check_same_config(config: SearchConfig, run: RunDirectory) -> None:
    assert run.header is not None
    differences = config.differences(run.header["config"])
    if differences:
        raise UserError(
            f"{str(run.path)!r} holds a run of another config: {'; '.join(differences)}. "
            f"Give the same options to resume it, or choose another --out."
        )


def _check_same_calibration(job: Job, run: RunDirectory) -> None:
    assert run.header is not None
    if run.header["calibration"] != _calibration(job.windows):
        raise UserError(
            f"the calibration text or the tokenizer has changed since {str(run.path)!r} was begun "
            f"({run.header['calibration']['num_tokens']} tokens then, {job.windows.tokens.numel()} now, or other "
            f"ones); restore it or choose another --out."
        )
