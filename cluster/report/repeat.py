"""The commands that do a run again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from cluster.report.recorded import Recorded


def search_command(run: Recorded) -> str:
    """`blockpruner search` with the recorded options that are not the defaults."""
    config = run.config
    given = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name != "model" and getattr(config, field.name) != field.default
    }
    return _command("search", config.model, **given, out=run.name)


def prune_command(run: Recorded) -> str:
    config = run.config
    return _command(
        "prune",
        config.model,
        run=run.name,
        num_remove=len(run.steps),
        out=f"{run.name}-pruned",
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def report_command(runs: Sequence[Recorded], **options: Any) -> str:
    return _command("report", *(run.name for run in runs), **options)


def _command(name: str, *arguments: str, **options: Any) -> str:
    words = ["blockpruner", name, *arguments]
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):  # given repeatedly
            words += [word for item in value for word in (flag, item)]
        elif isinstance(value, tuple):
            words += [flag, ",".join(value)] if value else []
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)
