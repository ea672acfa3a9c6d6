"""Answers a strategy: from the ledger what was scored before, else from replicas; and writes down what comes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from blockpruner.cluster.opening import Say
from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.score import Score, perplexity
from blockpruner.engine.scoring.scoring import OutOfMemory
from blockpruner.engine.search.audit import audit
from blockpruner.engine.search.oracle import Estimate, Found, Round, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.units import WorkUnit, split_work, window_groups, windows_per_row
from blockpruner.files import plain
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.replicas import Replicas
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory, StepSums, losses
from blockpruner.searching.summary import write_summary
from blockpruner.showing.console import Reporter


class KernelChanged(Exception):
    """A device ran out of memory, so calls are smaller from now on: the strategy starts again, with the answers of all
    phases that are done. (Calls of another size may give other bits, and the scores of a phase must be comparable.)"""


class RunOracle:
    """The Oracle of one run directory."""

    def __init__(
        self,
        config: SearchConfig,
        job: Job,
        space: SearchSpace,
        run: RunDirectory,
        reporter: Reporter,
        *,
        open_replicas: Callable[[Say], Replicas],
        flops_left: Callable[[Mask], float],
    ) -> None:
        """open_replicas: called when something must be scored that the ledger does not know. flops_left: about the work
        to come from a mask on."""
        self._config = config
        self._job = job
        self._space = space
        self._run = run
        self._reporter = reporter
        self._open = open_replicas
        self._flops_left = flops_left
        self._replicas: Replicas | None = None
        self.begin_again()

    def begin_again(self) -> None:
        """The strategy starts from its beginning."""
        self.num_phases = self._num_steps = self._num_rounds = 0
        self._enter(1)

    def say(self, text: str) -> None:
        """To the person, and to the timeline."""
        self._reporter.say(text)
        self._run.append_event("note", {"at_s": time.time(), "text": text})

    @property
    def groups(self) -> list[range]:
        windows = self._job.windows
        return window_groups(windows.num_windows, windows_per_row(windows.seq_len))

    @property
    def dense(self) -> Score:
        """The first score of the dense model: what later kernel shapes give may differ in the last bits."""
        lines = [line for line in self._run.of_type("score") if line["step"] == 0]
        if not lines:
            self._ready()
            return self.dense
        sums = (math.nan if value is None else value for value in lines[0]["window_sums"])
        return Score(Mask(), tuple(sums), self._job.windows.seq_len - 1)

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        groups = groups or self.groups
        if not all(self._known.has(masks, group.start, group.stop) for group in groups):
            replicas = self._ready()
            if failed := self._run_units(self._phase, masks, groups, self._known):
                self._shrink(replicas, failed)
                raise KernelChanged
        return [self._sum(mask, groups) for mask in masks]

    def audit(self, space: SearchSpace, found: Found, steps: Sequence[int]) -> None:
        """Do some steps again exhaustively; what was audited before is not audited again."""
        done = {line["step"] for line in self._run.of_type("audit")}
        for result in audit(space, found, self.dense, [step for step in steps if step not in done], self._score_again):
            self._enter(-result.step)
            values = {
                "step": result.step,
                "chosen": result.chosen.to_json(),
                "best": result.best.to_json(),
                "regret": result.regret,
                **self._spent(result.masks),
            }
            self._run.append("audit", values)
            per = " per share of all parameters" if space.per_params else ""
            verdict = (
                "greedy's choice"
                if result.chosen == result.best
                else (f"greedy would have removed {result.best}, which is {result.regret:.5f} nats{per} better")
            )
            self._reporter.say(f"audit of step {result.step}: {result.chosen}, {verdict} ({values['wall_s']:.1f} s)")
            write_summary(self._run, self._config, self._job, "running")

    def _score_again(self, step: int, masks: list[Mask]) -> list[Score]:
        while True:
            self._enter(-step)
            with suppress(KernelChanged):
                return self.score(masks)

    def removed(self, step: Step) -> None:
        self._num_steps += 1
        values = {
            "step": self._num_steps,
            "block": step.block.to_json(),
            **losses(step.score.value, self._config.metric),
            "ratio": self._job.shape.ratio(step.score.mask),
            "num_candidates": len(step.candidates),
            "num_scored": len(step.scores) + len(step.estimates),
            "num_exact": len(step.scores),
        }
        if self._is_new("step", "block", values["block"]):
            blocks = {candidate.mask: str(candidate.block) for candidate in step.candidates}
            self._record_scores([*step.scores, *step.estimates], blocks)
            values |= self._spent(list(blocks))
            self._run.append("step", values)
            total = self._num_steps + self._space.num_steps_left(step.score.mask)
            about = "about " if self._config.ratio else ""
            self._tell(f"step {self._num_steps} of {about}{total}: {step.block} removed", values, step.score.mask)
        self._next_phase()

    def judged(self, judged: Round) -> None:
        self._num_rounds += 1
        values = {
            "round": self._num_rounds,
            "name": judged.name,
            "mask": str(judged.best.mask),
            **losses(judged.best.value, self._config.metric),
            "ratio": self._job.shape.ratio(judged.best.mask),
            "num_candidates": len(judged.masks),
            "num_scored": len(judged.masks) if judged.num_scored is None else judged.num_scored,
            "num_exact": len(judged.scores),
        }
        if self._is_new("round", "mask", values["mask"]):
            self._record_scores(judged.scores, {})
            values |= self._spent(judged.masks)
            self._run.append("round", values)
            num_removed = self._space.num_removed(judged.best.mask)
            self._tell(f"{judged.name}: {num_removed} blocks removed", values, judged.best.mask)
        self._next_phase()

    def _sum(self, mask: Mask, groups: Sequence[range]) -> Score:
        known = self._known.sums[mask]
        return Score(mask, tuple(known[window] for group in groups for window in group), self._job.windows.seq_len - 1)

    def _enter(self, phase: int) -> None:
        self._phase = phase
        self._known = self._run.unit_results(phase)

    def _next_phase(self) -> None:
        self.num_phases += 1
        self._enter(self.num_phases + 1)

    def _is_new(self, kind: str, key: str, value: Any) -> bool:
        """Whether this phase was not recorded by an earlier session. Raises UserError if it came out otherwise."""
        if self.num_phases == len(self._run.phases):
            return True
        line = self._run.phases[self.num_phases]
        if (line["type"], line.get(key)) != (kind, value):
            raise UserError(
                f"{str(self._run.path)!r} was made by another version of this program or was changed: its record of "
                f"{line['type']} {line[line['type']]} does not follow from its scores; choose another --out."
            )
        return False

    def _ready(self) -> Replicas:
        """The replicas, opened when they are first needed; the dense model is scored before anything else.

        A resumed run scores it again and must get the same bits: else the model, the libraries or the processor are not
        those of the first part.
        """
        if self._replicas is not None:
            return self._replicas
        self._replicas = self._open(self.say)
        self._expect(Mask(), "search")
        if self._score_dense():
            raise KernelChanged
        return self._replicas

    def _score_dense(self) -> bool:
        """Returns whether calls had to become smaller."""
        assert self._replicas is not None
        kernel = self._replicas.kernel
        earlier = self._run.unit_results(0).sums.get(Mask(), {})
        known = StepSums()
        while failed := self._run_units(0, [Mask()], self.groups, known):
            self._shrink(self._replicas, failed, again=False)
            earlier, known = {}, StepSums()  # in another kernel shape the bits are others
        sums = known.sums[Mask()]
        score = Score(Mask(), tuple(sums[window] for window in range(len(sums))), self._job.windows.seq_len - 1)
        # A sum that is not finite is recorded as missing: JSON has no NaN.
        if any(plain(sums[window]) != plain(value) for window, value in earlier.items()):
            raise UserError(
                f"the dense model scores {score.value!r} here, not what {str(self._run.path)!r} recorded: the model, "
                f"the library versions or the processor differ. Resume it where it began, or choose another --out."
            )
        if not any(line["step"] == 0 for line in self._run.of_type("score")):
            self._enter(0)
            self._record_scores([score], {}, window_sums=score.window_sums)
            self._enter(self.num_phases + 1)
        if self._config.metric is Metric.PPL:
            self.say(f"dense: perplexity {perplexity(score.value):.4f}")
        write_summary(self._run, self._config, self._job, "running")
        return self._replicas.kernel != kernel

    def _shrink(self, replicas: Replicas, failed: OutOfMemory[WorkUnit], *, again: bool = True) -> None:
        kernel = replicas.shrink(replicas.kernel, failed.reason, self.say)
        self._run.append("kernel", kernel.to_json())
        replicas.kernel = kernel
        if again:
            self._score_dense()  # a resumed run compares the dense model's bits, which may be others now

    def _run_units(
        self, phase: int, masks: Sequence[Mask], groups: Sequence[range], known: StepSums
    ) -> OutOfMemory[WorkUnit] | None:
        """Add the sums of all units that are missing; returns a unit that did not fit the memory, if any."""
        assert self._replicas is not None
        units = split_work(
            masks,
            self._job.shape,
            self._replicas.kernel,
            groups=groups,
            seq_len=self._job.windows.seq_len,
            num_replicas=self._replicas.scorer.num_replicas,
            metric=self._config.metric,
        )
        failed: OutOfMemory[WorkUnit] | None = None
        before = time.perf_counter()
        missing = [unit for unit in units if not known.has(unit.masks, unit.first, unit.stop)]
        for result in self._replicas.scorer.run(missing):
            if isinstance(result, OutOfMemory):
                failed = result
                continue
            unit = result.unit
            known.add(unit.masks, unit.first, unit.stop, result.value, result.seconds, result.replica)
            now = time.perf_counter()
            self._run.append_unit(phase, result, wall_s=now - before)
            before = now
            self._reporter.advance(unit.flops)
        return failed

    def _record_scores(self, scores: Sequence[Score | Estimate], blocks: Mapping[Mask, str], **more: Any) -> None:
        """`score` lines, but for those that an interrupted session wrote before. blocks: each candidate's name."""
        written = {line["mask"] for line in self._run.of_type("score") if line["step"] == self._phase}
        for score in scores:
            if str(score.mask) not in written:
                num_windows = len(score.window_sums) if isinstance(score, Score) else score.num_windows
                self._run.append(
                    "score",
                    {
                        "step": self._phase,
                        "block": blocks.get(score.mask),
                        "mask": str(score.mask),
                        **losses(score.value, self._config.metric),
                        "num_windows": num_windows,
                        "exact": isinstance(score, Score),
                        "seconds": self._known.seconds[score.mask],
                        "replica": "+".join(sorted(self._known.replicas[score.mask])),
                        **more,
                    },
                )

    def _spent(self, masks: Sequence[Mask]) -> dict[str, Any]:
        """What this phase took, and what the plain loop would have done for the same masks."""
        windows, shape = self._job.windows, self._job.shape
        flops, wall_s = self._run.spent(self._phase)
        scorer = self._replicas.scorer if self._replicas else None
        return {
            "work_flops": flops,
            "naive_work_flops": windows.num_windows * sum(shape.forward_flops(mask, windows.seq_len) for mask in masks),
            "wall_s": wall_s,
            "num_replicas": scorer.num_replicas if scorer else None,
            "num_lost": scorer.num_lost if scorer else None,
            "placement": self._replicas.spec.placement if self._replicas else None,
        }

    def _tell(self, text: str, values: dict[str, Any], mask: Mask) -> None:
        self._expect(mask, text.partition(":")[0])
        metric = self._config.metric
        loss = f"perplexity {values['perplexity']:.4f}" if metric is Metric.PPL else f"{metric} {values[metric]:.5f}"
        number = values["num_replicas"]
        on = f" on {number} replica{'s' * (number > 1)}" if number else ""
        lost = f" ({values['num_lost']} lost)" if values["num_lost"] else ""
        scored = f"{values['num_scored']} of {values['num_candidates']}"
        if values["num_exact"] < values["num_scored"]:
            scored += f" ({values['num_exact']} in full)"
        self._reporter.say(
            f"{text}, {loss}, ratio {values['ratio']:.4f}, {scored} candidates in {values['wall_s']:.1f} s{on}{lost}, "
            f"ETA {self._reporter.eta}"
        )
        write_summary(self._run, self._config, self._job, "running")

    def _expect(self, mask: Mask, description: str) -> None:
        """Work of this session as far as it can be foreseen."""
        windows = self._job.windows
        left = windows.num_windows * self._flops_left(mask)
        self._reporter.expect(self._reporter.done + left, description)
