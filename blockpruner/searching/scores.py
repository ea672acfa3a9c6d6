"""Scores of masks, from the ledger if they are known, else from replicas, which open when they are first needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

from blockpruner.engine.blocks import Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.compensation.config import IN_SEARCH_RIDGE
from blockpruner.engine.compensation.searching import Fitted, scored
from blockpruner.engine.errors import UserError
from blockpruner.engine.score import Score
from blockpruner.engine.scoring.narrowing import in_order
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer, UnitResult
from blockpruner.engine.work.units import KernelShape, WorkUnit, split_work, window_groups, windows_per_row
from blockpruner.files import plain
from blockpruner.searching.channels import has_lost_order, order_of_run
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.fits import METHOD, Fits
from blockpruner.searching.header import header_of
from blockpruner.searching.records import CompensationRecord, KernelRecord, ScoreRecord, Sums
from blockpruner.searching.replicas import Replicas, open_replicas
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.telling import Telling

Append = Callable[[UnitResult[WorkUnit], float], None]


class KernelChanged(Exception):
    """A device ran out of memory, so calls are smaller from now on.

    The strategy starts again and gets the recorded answers of all completed phases. The scores of one phase must be
    comparable, and calls of another size can change their last bits.
    """


class Scores:
    """Scores for one phase at a time, selected by `enter`."""

    def __init__(self, config: SearchConfig, job: Job, run: RunDirectory, telling: Telling, stack: ExitStack) -> None:
        """stack: closes everything that is opened here."""
        self._config, self._job, self._run, self._telling, self._stack = config, job, run, telling, stack
        self._replicas: Replicas | None = None
        self._fits = Fits(job, run, telling)
        self._order: ChannelOrder | None = None
        self.enter(1)

    def enter(self, phase: int) -> None:
        self.phase = phase
        self.known = self._run.sums(phase)

    @property
    def groups(self) -> list[range]:
        """Window indices in groups that are scored together."""
        windows = self._job.windows
        return window_groups(windows.num_windows, windows_per_row(windows.seq_len))

    @property
    def dense(self) -> Score:
        """The first score of the dense model."""
        if self._run.dense is None:
            self._open()
        assert self._run.dense is not None
        return Score(Mask(), self._run.dense.window_sums, self._job.windows.seq_len - 1)

    @property
    def scorer(self) -> Scorer | None:
        """The scorer; None while the ledger has answered everything."""
        return None if self._replicas is None else self._replicas.scorer

    @property
    def placement(self) -> str | None:
        return None if self._replicas is None else self._replicas.placement

    def restore_order(self) -> None:
        """Compute the order of the channels again if its file is lost, though all scores are known."""
        if self._replicas is None and has_lost_order(self._run):
            self._open()

    def show_perplexity(self, perplexity: float | None) -> None:
        """Show the perplexity that a search has come to on dashboards. Not every metric has one."""
        if self._replicas is not None and perplexity is not None:
            self._replicas.metrics.show("best_perplexity", perplexity)

    def of(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        """Return the scores over the windows of `groups`, in the order of the masks. Raises KernelChanged."""
        groups = groups or self.groups
        if not all(self.known.has(list(masks), group.start, group.stop) for group in groups):
            replicas = self._open()
            refit = self._run.refit(before=abs(self.phase))
            fitted = None if refit is None else self._fits.of(refit, replicas.scorer)
            append = partial(self._run.append_unit, self.phase)
            if failed := self._run_units(replicas, masks, groups, self.known, append, fitted):
                self._start_again(replicas, failed)
        return [self._score(mask, groups, self.known) for mask in masks]

    def refit(self, step: int, before: Score) -> CompensationRecord | None:
        """Refit the blocks that a step left, if that is due, and record it. Raises KernelChanged.

        before: score of the step. Unless the refit lowers it, on windows that were not fitted on, nothing is changed.
        """
        if not self._fits.is_due(step):
            return None
        replicas, mask = self._open(), before.mask
        fitted, work_flops, wall_s = self._fits.fit(step, mask, replicas.scorer)
        start, known = time.perf_counter(), Sums()
        if failed := self._run_units(replicas, [mask], self.groups, known, lambda result, wall_s: None, fitted):
            self._start_again(replicas, failed)
        score, fit = self._score(mask, self.groups, known), self._job.fit
        assert fit is not None
        if is_better := score.value < before.value:
            self._fits.keep(fitted)
        wall_s += time.perf_counter() - start
        record = CompensationRecord.of(
            step=step,
            mask=str(mask),
            method=METHOD.name,
            ridge=IN_SEARCH_RIDGE,
            num_tokens=fit.windows.tokens.numel(),
            digest=fitted.digest,
            is_used=is_better,
            **self._config.metric.recorded(score.value),
            window_sums=score.window_sums,
            work_flops=round(work_flops),
            wall_s=wall_s,
        )
        self._run.append(record)
        self._telling.refit(record)
        return record

    def refitted(self, record: CompensationRecord) -> Score:
        """Return the recorded score of a refitted model."""
        return Score(Mask.parse(record.mask), record.window_sums, self._job.windows.seq_len - 1)

    def _start_again(self, replicas: Replicas, failed: OutOfMemory[Any]) -> NoReturn:
        self._shrink(replicas, failed)
        self._score_dense(replicas)  # a resumed run compares its bits, which may have changed
        raise KernelChanged

    def _score(self, mask: Mask, groups: Sequence[range], known: Sums) -> Score:
        sums = known.sums[mask]
        return Score(mask, tuple(sums[window] for group in groups for window in group), self._job.windows.seq_len - 1)

    def _open(self) -> Replicas:
        """Return the replicas. When they are first opened, they score the dense model before anything else.

        A resumed run scores the dense model again and must get the same bits. Otherwise the model, the libraries or the
        processor have changed.
        """
        if self._replicas is not None:
            return self._replicas
        run, header, job = str(self._run.path), self._run.header, self._job
        if header is not None and (header.dtype, header.device) != (job.dtype, job.device):
            raise UserError(
                f"{run!r} began in {header.dtype} on {header.device}, and would go on in {job.dtype} on {job.device}, "
                f"which gives other scores. Resume the run where it began, or choose another `out`."
            )
        opened = open_replicas(self._config, self._job, self._run.kernel, self._telling.note, run)
        self._replicas = replicas = self._stack.enter_context(opened)
        if self._run.header is None:
            self._run.append(header_of(self._config, self._job, replicas))
        if self._job.is_cut:
            by = self._config.strategy.ordered_by
            self._order = order_of_run(self._job, self._run, self._telling, replicas.scorer, by)
        self._telling.expect(Mask(), "search")
        if self._score_dense(replicas):
            raise KernelChanged
        return replicas

    def _score_dense(self, replicas: Replicas) -> bool:
        """Score the dense model. Returns whether calls had to become smaller."""
        kernel = replicas.kernel
        earlier = self._run.sums(0).sums.get(Mask(), {})
        known = Sums()
        # If there is a record to compare with, nothing is written before the comparison.
        waiting: list[tuple[UnitResult[WorkUnit], float]] = []
        record = partial(self._run.append_unit, 0)
        append: Append = (lambda *unit: waiting.append(unit)) if earlier else record
        while failed := self._run_units(replicas, [Mask()], self.groups, known, append):
            self._shrink(replicas, failed)
            earlier, known, append = {}, Sums(), record  # another kernel shape can give other bits
            waiting.clear()
        score = self._score(Mask(), self.groups, known)
        # Compare as plain JSON, since NaN does not equal itself.
        if any(plain(known.sums[Mask()][window]) != plain(value) for window, value in earlier.items()):
            raise UserError(
                f"the dense model scores {score.value!r} here, which differs from the record in "
                f"{str(self._run.path)!r}: the model, the library versions or the processor have changed. Resume the "
                f"run where it began, or choose another `out`."
            )
        for unit in waiting:
            record(*unit)
        if self._run.dense is None:
            metric = self._config.metric
            score_record = ScoreRecord.of(
                phase=0, block=None, mask=str(Mask()), **metric.recorded(score.value),
                num_windows=len(score.window_sums), exact=True, seconds=known.seconds[Mask()],
                replica="+".join(sorted(known.replicas[Mask()])), window_sums=score.window_sums,
            )  # fmt: skip
            self._run.append(score_record)
        self._telling.dense(score)
        return replicas.kernel != kernel

    def _shrink(self, replicas: Replicas, failed: OutOfMemory[WorkUnit]) -> None:
        replicas.kernel = replicas.shrink(replicas.kernel, failed.reason, self._telling.note)
        self._run.append(_kernel_record(replicas.kernel))

    def _run_units(
        self,
        replicas: Replicas,
        masks: Sequence[Mask],
        groups: Sequence[range],
        known: Sums,
        append: Append,
        fitted: Fitted | None = None,
    ) -> OutOfMemory[Any] | None:
        """Run all missing units and add their sums. Returns a unit that did not fit into memory, if any.

        append: records a unit, as `RunDirectory.append_unit`. fitted: weights of a refit to score the masks with.
        """
        units = split_work(
            masks,
            self._job.shape,
            replicas.kernel,
            groups=groups,
            seq_len=self._job.windows.seq_len,
            num_replicas=replicas.scorer.num_replicas,
            metric=self._config.metric,
        )
        failed: OutOfMemory[Any] | None = None
        before = time.perf_counter()
        missing = [unit for unit in units if not known.has(unit.masks, unit.first, unit.stop)]
        scorer = replicas.scorer
        results = scored(scorer, missing, fitted) if self._order is None else in_order(scorer, missing, self._order)
        for result in results:
            if isinstance(result, OutOfMemory):
                failed = result
                continue
            unit = result.unit
            known.add(unit.masks, unit.first, unit.stop, result.value, result.seconds, result.replica)
            now = time.perf_counter()
            append(result, now - before)
            replicas.metrics.count("windows_done", len(unit.masks) * (unit.stop - unit.first))
            before = now
            self._telling.advance(unit.flops)
        return failed


def _kernel_record(kernel: KernelShape) -> KernelRecord:
    return KernelRecord.of(**kernel.to_json())
