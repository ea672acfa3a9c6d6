"""Command lines as text."""

from __future__ import annotations

import shlex
from typing import Any

RENAMED = {"as_json": "json", "time_for": "for"}
"""Fields whose option has another name, because Python code cannot use that name or uses it for something else."""


def flag(field: str) -> str:
    """Return the option of a field."""
    return f"--{RENAMED.get(field, field).replace('_', '-')}"


def command_line(name: str, /, *arguments: str, **options: Any) -> str:
    """Return a `blockpruner` command. A list is a repeated option, a tuple one with commas; None and False are left
    out."""
    words = ["blockpruner", name, *arguments]
    for option, value in options.items():
        if value is True:
            words.append(flag(option))
        elif isinstance(value, list):  # a repeated option
            words += [word for item in value for word in (flag(option), str(item))]
        elif isinstance(value, tuple):
            words += [flag(option), ",".join(map(str, value))] if value else []
        elif value is not None and value is not False:
            words += [flag(option), str(value)]
    return shlex.join(words)
