"""Command lines as text."""

from __future__ import annotations

import shlex
from typing import Any


def command_line(name: str, /, *arguments: str, **options: Any) -> str:
    """Return a `blockpruner` command. A list is a repeated option, a tuple one with commas; None and False are left
    out."""
    words = ["blockpruner", name, *arguments]
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):  # a repeated option
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, tuple):
            words += [flag, ",".join(map(str, value))] if value else []
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)
