"""Messages to the user while a search runs."""

from __future__ import annotations

import math
import time

from blockpruner.engine.blocks import Mask, amount
from blockpruner.engine.score import Score
from blockpruner.engine.search.budget import Per
from blockpruner.engine.work.times import UNIT, BlockTimes
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.records import AuditRecord, CompensationRecord, RoundRecord, StepRecord
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.showing.console import Reporter

PER = {Per.BLOCK: "", Per.PARAMS: " per share of all parameters", Per.MS: " per share of the dense model's time"}


class Telling:
    """Prints lines and a progress bar. Notes are also recorded in the timeline of the run."""

    def __init__(self, config: SearchConfig, job: Job, run: RunDirectory, reporter: Reporter) -> None:
        self._config, self._job, self._run, self._reporter = config, job, run, reporter

    def note(self, text: str) -> None:
        self._reporter.say(text)
        self._run.append_event("note", {"at_s": time.time(), "text": text})

    def dense(self, score: Score) -> None:
        metric = self._config.metric
        if not metric.needs_dense:
            self.note(f"dense: {metric.label} {metric.shown(metric.recorded(score.value)):.4f}")

    def step(self, record: StepRecord, mask: Mask) -> None:
        self.expect(mask, f"step {record.step}")
        total = record.step + self._job.space.num_steps_left(mask)
        about = "about " if self._config.num_remove is None else ""
        times = self._job.space.times
        expected = "" if times is None else f", {times.without(mask):.4g} ms expected"
        self._tell(f"step {record.step} of {about}{total}: {record.removed} removed{expected}", record)

    def refit(self, record: CompensationRecord) -> None:
        unused = "" if record.is_used else ", no better than without; the search goes on with the weights that it had"
        self._reporter.say(
            f"refit after step {record.step} on {record.num_tokens:,} tokens: perplexity "
            f"{record.perplexity or math.nan:.4f}{unused} ({record.wall_s:.1f} s)"
        )

    def round(self, record: RoundRecord, mask: Mask, num_left: int | None) -> None:
        self.expect(mask, record.name, num_left)
        self._tell(f"{record.name}: {amount(self._job.space.removed(mask))} removed", record)

    def audit(self, record: AuditRecord, chosen: str, best: str) -> None:
        per = PER[self._job.space.per]
        better = f"greedy would have removed {best}, which is {record.regret:.5f} nats{per} better"
        verdict = "greedy's choice" if chosen == best else better
        self._reporter.say(f"audit of step {record.step}: {chosen}, {verdict} ({record.wall_s:.1f} s)")

    def expected_time(self, times: BlockTimes, mask: Mask) -> None:
        unit = UNIT[self._config.time_for]
        self._reporter.say(f"expected: {times.without(mask):.4g} ms {unit}, {times.dense:.4g} for the dense model")

    def expect(self, mask: Mask, description: str, rounds_left: int | None = None) -> None:
        """Update the total of the bar with the work that the strategy expects after this mask."""
        windows, space = self._job.windows, self._job.space
        left = windows.num_windows * self._config.strategy.flops_left(space, mask, windows.seq_len, rounds_left)
        self._reporter.expect(self._reporter.done + left + self._refits_left(mask), description)

    def _refits_left(self, mask: Mask) -> float:
        """FLOPs of the refits after this mask."""
        fit, space = self._job.fit, self._job.space
        if fit is None:
            return 0.0
        done = space.num_removed(mask)
        number = (done + space.num_steps_left(mask)) // fit.every - done // fit.every
        return number * fit.flops

    def advance(self, flops: float) -> None:
        self._reporter.advance(flops)

    def _tell(self, text: str, record: StepRecord | RoundRecord) -> None:
        metric = self._config.metric
        number = record.num_replicas
        on = f" on {number} replica{'s' * (number > 1)}" if number else ""
        lost = f" ({record.num_lost} lost)" if record.num_lost else ""
        scored = f"{record.num_scored} of {record.num_candidates}"
        if record.num_exact < record.num_scored:
            scored += f" ({record.num_exact} in full)"
        self._reporter.say(
            f"{text}, {metric.label} {metric.shown(record.values()):.4f}, ratio {record.ratio:.4f}, {scored} "
            f"candidates in {record.wall_s:.1f} s{on}{lost}, ETA {self._reporter.eta}"
        )
