"""The oracle of one run directory: it answers a strategy and records the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.score import Score
from blockpruner.engine.search.oracle import Estimate, Round, Step
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.records import CompensationRecord, PhaseRecord, RoundRecord, ScoreRecord, StepRecord
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.scores import Scores
from blockpruner.searching.summary import write_summary
from blockpruner.searching.telling import Telling

OnStep = Callable[[StepRecord], None]


class RunOracle:
    """Implements `engine.search.oracle.Oracle`. Records of an earlier session are checked, not written again."""

    def __init__(
        self, config: SearchConfig, job: Job, run: RunDirectory, scores: Scores, telling: Telling, on_step: OnStep
    ) -> None:
        """on_step: called after each removal."""
        self._config, self._job, self._run = config, job, run
        self._scores, self._telling, self._on_step = scores, telling, on_step
        self.begin_again()

    def begin_again(self) -> None:
        """Prepare for the strategy to start again from the first step."""
        self.num_phases = self._num_steps = self._num_rounds = 0
        self._scores.enter(1)

    @property
    def groups(self) -> list[range]:
        return self._scores.groups

    @property
    def dense(self) -> Score:
        return self._scores.dense

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        return self._scores.of(masks, groups)

    def removed(self, step: Step) -> Score:
        self._num_steps += 1
        refit = next((one for one in self._run.all(CompensationRecord) if one.step == self._num_steps), None)
        known = self._recorded(StepRecord, "block", step.block.to_json())
        if known is None:
            blocks = {candidate.mask: str(candidate.block) for candidate in step.candidates}
            refit = refit or self._scores.refit(self._num_steps, step.score)
            self.record_scores([*step.scores, *step.estimates], blocks)
            known = StepRecord.of(
                step=self._num_steps,
                block=step.block.to_json(),
                **self._config.metric.recorded(step.score.value),
                ratio=self._job.shape.ratio(step.score.mask),
                num_candidates=len(step.candidates),
                num_scored=len(step.scores) + len(step.estimates),
                num_exact=len(step.scores),
                **self.spent(blocks),
            )
            self._run.append(known)
            self._telling.step(known, step.score.mask)
            self._scores.show_perplexity(known.perplexity)
            write_summary(self._run, self._config, self._job, "running")
        self._on_step(known)
        self._next_phase()
        return self._scores.refitted(refit) if refit is not None and refit.is_used else step.score

    def judged(self, judged: Round) -> None:
        self._num_rounds += 1
        if self._recorded(RoundRecord, "mask", str(judged.best.mask)) is None:
            self.record_scores(judged.scores, {})
            record = RoundRecord.of(
                round=self._num_rounds,
                name=judged.name,
                mask=str(judged.best.mask),
                **self._config.metric.recorded(judged.best.value),
                ratio=self._job.shape.ratio(judged.best.mask),
                num_candidates=len(judged.masks),
                num_scored=len(judged.masks) if judged.num_scored is None else judged.num_scored,
                num_exact=len(judged.scores),
                **self.spent(judged.masks),
            )
            self._run.append(record)
            self._telling.round(record, judged.best.mask, judged.num_left)
            self._scores.show_perplexity(record.perplexity)
            write_summary(self._run, self._config, self._job, "running")
        self._next_phase()

    def record_scores(self, scores: Sequence[Score | Estimate], blocks: Mapping[Mask, str]) -> None:
        """Append the score records of this phase, except those that an interrupted session already wrote.

        blocks: the name of each candidate.
        """
        phase, known = self._scores.phase, self._scores.known
        written = {record.mask for record in self._run.all(ScoreRecord) if record.phase == phase}
        for score in scores:
            if str(score.mask) not in written:
                record = ScoreRecord.of(
                    phase=phase,
                    block=blocks.get(score.mask),
                    mask=str(score.mask),
                    **self._config.metric.recorded(score.value),
                    num_windows=len(score.window_sums) if isinstance(score, Score) else score.num_windows,
                    exact=isinstance(score, Score),
                    seconds=known.seconds[score.mask],
                    replica="+".join(sorted(known.replicas[score.mask])),
                )
                self._run.append(record)

    def spent(self, masks: Iterable[Mask]) -> dict[str, Any]:
        """Return the fields of `records.Spent` for this phase."""
        windows, shape, scorer = self._job.windows, self._job.shape, self._scores.scorer
        flops, wall_s = self._run.spent(self._scores.phase)
        return {
            "work_flops": flops,
            "naive_work_flops": windows.num_windows * sum(shape.forward_flops(mask, windows.seq_len) for mask in masks),
            "wall_s": wall_s,
            "num_replicas": scorer.num_replicas if scorer else None,
            "num_lost": scorer.num_lost if scorer else None,
            "placement": self._scores.placement,
        }

    def _next_phase(self) -> None:
        self.num_phases += 1
        self._scores.enter(self.num_phases + 1)

    def _recorded(self, kind: type[PhaseRecord], field: str, value: Any) -> Any:
        """Return the record that an earlier session wrote for this phase, or None for a new phase.

        Raises UserError if that record has another result.
        """
        if self.num_phases == len(self._run.phases):
            return None
        record = self._run.phases[self.num_phases]
        if not isinstance(record, kind) or getattr(record, field) != value:
            number = record.step if isinstance(record, StepRecord) else record.round
            raise UserError(
                f"{str(self._run.path)!r} was written by another version of this program or was modified: its record "
                f"of {record.type} {number} does not match its scores; choose another `out`."
            )
        return record
