"""The commands that reproduce a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockpruner.reporting.recorded import Recorded
from blockpruner.showing.commands import command_line
from blockpruner.showing.measurements import read_object


def search_command(run: Recorded) -> str:
    """Return the `blockpruner search` command with the recorded options that differ from the defaults."""
    config = run.config
    given = {
        name: list(value) if name == "calibration" else value  # repeated, since names of files may have commas
        for name, value in config.given().items()
        if name != "model"
    }
    return command_line("search", config.model, **given, out=run.name)


def prune_command(run: Recorded) -> str:
    config = run.config
    return command_line(
        "prune",
        config.model,
        run=run.name,
        num_remove=len(run.steps),
        out=f"{run.name}-pruned",
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def report_command(runs: Sequence[Recorded], **options: Any) -> str:
    return command_line("report", *(run.name for run in runs), **options)


def evaluate_command(path: Path) -> str:
    """Return the `blockpruner evaluate` command that wrote the file."""
    found = read_object(path)
    setting = found.get("setting")
    # Rows without a run are masks, which no option can set.
    if not isinstance(setting, dict) or "model" not in found or ("rows" in found and not setting.get("run")):
        return _unknown(path)
    options = {
        name: tuple(value)
        if name in ("tasks", "num_remove") and isinstance(value, list)
        else value  # one option with commas
        for name, value in setting.items()
        if name != "versions"
    }
    if path.name == "evaluation.json":
        return command_line("evaluate", str(found["model"]), **{**options, "out": str(path.parent)})
    return _printing(path, "evaluate", str(found["model"]), options)


def latency_command(path: Path) -> str:
    """Return the `blockpruner latency` command that wrote the file."""
    setting = read_object(path).get("setting")
    if not isinstance(setting, dict) or "model" not in setting:
        return _unknown(path)
    options = {name: value for name, value in setting.items() if name != "model"}
    return _printing(path, "latency", str(setting["model"]), options)


def _printing(path: Path, name: str, model: str, options: dict[str, Any]) -> str:
    return f"{command_line(name, model, **{**options, 'json': True})} > {shlex.quote(str(path))}"


def _unknown(path: Path) -> str:
    return f"# {str(path)!r} does not record the command that made it"
