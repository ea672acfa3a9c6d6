"""Methods that score masks: `blockpruner search` with method-specific options.

The published code of these methods differs as follows:

- SLEB scores by the sum of the token NLLs, which ranks windows of equal length in the same way as the mean.
- Shortened-LLaMA scores 10 samples of 128 tokens. Its "+" variants, which keep the first four and the last two layers,
  are not implemented here, because they rank by other statistics.
- FinerCut uses 10 samples of 256 tokens of WikiText-2 in float32. Its option that excludes the first layers at the
  beginning is not implemented here. `engine/losses.py` describes its divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from blockpruner.comparing.method import Clock, Method
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Searched(Method):
    changes: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Fields of `SearchConfig` that the method sets."""
    keep_ends: ClassVar[bool] = False
    """Whether to keep the first and the last layer."""

    def told(self, common: SearchConfig, num_layers: int) -> SearchConfig:
        keep = ("layer.0", f"layer.{num_layers - 1}") if self.keep_ends else ()
        return common.replace(**self.changes, keep=keep)

    def check(self, told: SearchConfig, model: PreTrainedModel, shape: ModelShape) -> None:
        told.space(shape)

    def run(self, told: SearchConfig, folder: Path, reporter: Reporter, clock: Clock) -> dict[str, Any]:
        """Search. Also returns whether an earlier session did part of it, and the total CPU threads of all replicas."""
        from blockpruner.searching.driver import run_search
        from blockpruner.searching.reading import read_events

        run = folder / "run"
        was_resumed = (run / "ledger.jsonl").exists()
        summary = run_search(told, run, reporter)
        units = [event for event in read_events(run) if event["type"] == "unit"]
        if not was_resumed:
            clock.loaded(min(unit["start_s"] for unit in units))
        last_s = max(unit["stop_s"] for unit in units)
        spent_s, work_flops, steps = 0.0, 0, []
        for number, step in enumerate(summary["steps"], start=1):
            spent_s += step["wall_s"]
            work_flops += step["work_flops"]
            if "rounds" in summary:  # whole masks were compared, so the order is known only at the end
                done_s, work_flops = last_s, summary["totals"]["work_flops"]
            else:
                done_s = max((unit["stop_s"] for unit in units if unit["step"] == number), default=last_s)
            search_s = spent_s if was_resumed else clock.search_s(done_s)
            steps.append(
                {"block": step["block"], "ratio": step["ratio"], "search_s": search_s, "work_flops": work_flops}
            )
        num_threads = (summary["num_replicas"] or 1) * summary["kernel"]["threads"]
        return {"steps": steps, "was_resumed": was_resumed, "num_threads": num_threads}
