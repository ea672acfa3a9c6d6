"""The options of a measurement of what blocks cost in time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from blockpruner.engine.judge.workload import REPEATS, Workload
from blockpruner.engine.options import Options
from blockpruner.engine.sections import Device, Dtype, Model, Precision


class Timed(Options):
    """What to generate"""

    prompt_len: int | None = Field(default=None, ge=1)
    """Number of tokens in a prompt. Default: that of the table of `run`, else 512."""
    num_tokens: int | None = Field(default=None, ge=2)
    """Number of tokens to generate greedily after each prompt. Default: that of the table of `run`, else 128."""
    batch_size: int | None = Field(default=None, ge=1)
    """Number of prompts in one batch. Default: that of the table of `run`, else 1."""
    static_cache: bool = False
    """Use a KV cache of fixed size. It is used, too, if the table of `run` was measured with one."""


class TimesConfig(Precision, Timed, Model):
    repeats: int = Field(default=REPEATS, ge=1)
    """Number of measured generations of each model, after one warm-up."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. Default: those of the table of `run`, else all."""
    run: Path | None = None
    """Also measure the model that the search in this run directory found, beside what the table expects of it. What
    other options leave open is then as in the search's own table."""

    def like(self, setting: Mapping[str, Any]) -> TimesConfig:
        """Return this config with what it leaves open as in a setting. setting: of a table, or empty."""
        chosen = {name: setting.get(name) for name in ("prompt_len", "num_tokens", "batch_size", "threads")}
        left_open = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        if self.device is Device.AUTO:
            left_open["device"] = setting.get("device")
        if self.dtype is Dtype.AUTO:
            left_open["dtype"] = setting.get("dtype")
        left_open["static_cache"] = self.static_cache or setting.get("static_cache")
        return self.replace(**{name: value for name, value in left_open.items() if value is not None})

    @property
    def workload(self) -> Workload:
        return Workload(**{name: value for name, value in self.part(Timed) if value is not None})
