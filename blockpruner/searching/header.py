"""The first line of a ledger, and the checks against it when a run is resumed."""

from __future__ import annotations

import platform
from importlib.metadata import version

from blockpruner.engine.calibration import Windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.identity import Identity
from blockpruner.engine.text.files import recorded_name
from blockpruner.engine.work.times_file import costs_of
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.content import CalibrationSummary
from blockpruner.searching.records import RunRecord
from blockpruner.searching.replicas import Replicas
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory


def header_of(config: SearchConfig, job: Job, replicas: Replicas) -> RunRecord:
    return RunRecord.of(
        config={**config.to_json(), "model": job.identity.name, "calibration": recorded_name(config.calibration)},
        dtype=job.dtype,
        device=job.device,
        kernel=replicas.kernel.to_json(),
        placement=replicas.placement,
        calibration=_calibration(job.windows),
        **({} if job.fit is None else {"fitted_on": _calibration(job.fit.windows)}),
        versions={
            **{package: version(package) for package in ("blockpruner", "torch", "transformers", "ray")},
            "python": platform.python_version(),
        },
        fingerprint=job.identity.fingerprint,
        num_parameters=job.shape.num_parameters,
        num_layers=job.shape.num_layers,
        mixers=list(job.shape.mixers) or None,
        missing=[block.to_json() for block in sorted(job.shape.missing, key=lambda block: block.depth)] or None,
        **({} if job.space.times is None else {"times": costs_of(job.space.times)}),
        **({"times_setting": dict(job.times_setting)} if job.times_setting else {}),
    )


def identity_of(header: RunRecord) -> Identity:
    """Return the model that a run searched."""
    return Identity(str(header.config["model"]), header.fingerprint)


def check_config(config: SearchConfig, model: Identity, run: RunDirectory) -> None:
    """Raise UserError if the run began with another config or another model."""
    if run.header is None:
        return
    began, recorded = identity_of(run.header), run.header.config
    if began.fingerprint is not None and began.fingerprint == model.fingerprint:  # the same commit, whatever its name
        recorded = {**recorded, "revision": config.revision}
    if differences := config.differences(recorded):
        raise UserError(
            f"{str(run.path)!r} holds a run of another config: {differences}. "
            f"Give the same options to resume it, or choose another `out`."
        )
    if not began.is_same(model):
        raise UserError(
            f"{str(run.path)!r} holds a run of another model: it began with {began}, now it is {model}. Give "
            f"{began.how_to_give} to resume it, or choose another `out`."
        )


def check_times(job: Job, run: RunDirectory) -> None:
    """Raise UserError if the run began with other times of blocks."""
    if run.header is None:
        return
    mine = None if job.space.times is None else costs_of(job.space.times)
    if mine is None and run.header.times is not None:
        raise UserError(
            f"{str(run.path)!r} began as a search in milliseconds; go on with `budget_ms` or `per=ms`, or choose "
            f"another `out`."
        )
    if run.header.times != mine:
        raise UserError(
            f"{str(run.path)!r} began with other times of blocks; give the table that it began with to resume it, or "
            f"choose another `out`."
        )


def check_calibration(job: Job, run: RunDirectory) -> None:
    """Raise UserError if the run began with other windows."""
    if run.header is None:
        return
    recorded, fitted_on = run.header.calibration, None if job.fit is None else _calibration(job.fit.windows)
    if (recorded, run.header.fitted_on) != (_calibration(job.windows), fitted_on):
        raise UserError(
            f"the calibration text or the tokenizer has changed since {str(run.path)!r} began "
            f"({recorded['num_tokens']} tokens then, {job.windows.tokens.numel()} now, or different ones); restore it, "
            f"or choose another `out`."
        )


def _calibration(windows: Windows) -> CalibrationSummary:
    return {
        "num_windows": windows.num_windows,
        "num_tokens": windows.tokens.numel(),
        "fingerprint": windows.fingerprint,
    }
