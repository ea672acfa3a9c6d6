"""The first line of a ledger, and the checks against it when a run is resumed."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from blockpruner.engine.calibration import Windows
from blockpruner.engine.errors import UserError
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.records import RunRecord
from blockpruner.searching.replicas import Replicas
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory


def header_of(config: SearchConfig, job: Job, replicas: Replicas) -> RunRecord:
    return RunRecord.of(
        config=config.to_json(),
        dtype=job.dtype,
        device=job.device,
        kernel=replicas.kernel.to_json(),
        placement=replicas.placement,
        calibration=_calibration(job.windows),
        versions={
            **{package: version(package) for package in ("blockpruner", "torch", "transformers", "ray")},
            "python": platform.python_version(),
        },
    )


def check_config(config: SearchConfig, run: RunDirectory) -> None:
    """Raise UserError if the run began with another config."""
    if run.header is not None and (differences := config.differences(run.header.config)):
        raise UserError(
            f"{str(run.path)!r} holds a run of another config: {differences}. "
            f"Give the same options to resume it, or choose another `out`."
        )


def check_calibration(job: Job, run: RunDirectory) -> None:
    """Raise UserError if the run began with other windows."""
    if run.header is not None and (recorded := run.header.calibration) != _calibration(job.windows):
        raise UserError(
            f"the calibration text or the tokenizer has changed since {str(run.path)!r} began "
            f"({recorded['num_tokens']} tokens then, {job.windows.tokens.numel()} now, or different ones); restore it, "
            f"or choose another `out`."
        )


def _calibration(windows: Windows) -> dict[str, Any]:
    return {
        "num_windows": windows.num_windows,
        "num_tokens": windows.tokens.numel(),
        "fingerprint": windows.fingerprint,
    }
