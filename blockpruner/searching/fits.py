"""The refits of a search: the blocks that remain after some removals, fitted on windows that are not scored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.compensation.changed_file import digest_of, read_changed, write_changed
from blockpruner.engine.compensation.config import IN_SEARCH_RIDGE
from blockpruner.engine.compensation.fitting import Fitting, Trial, parts_of
from blockpruner.engine.compensation.methods.both import Both
from blockpruner.engine.compensation.projections import Weights, weights_in
from blockpruner.engine.compensation.replica import StagesUnit
from blockpruner.engine.compensation.searching import FitScorer, Fitted
from blockpruner.engine.compensation.stages import FittedStage
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.model.loading import DTYPES, load_model, stored_dtype
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer
from blockpruner.files import replacing
from blockpruner.searching.records import CompensationRecord
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.telling import Telling

CPU = torch.device("cpu")
METHOD = Both()
FOLDER = "refits"


class Fits:
    """Fits weights, keeps them in the run directory, and finds them there again."""

    def __init__(self, job: Job, run: RunDirectory, telling: Telling) -> None:
        self._job, self._run, self._telling = job, run, telling
        self._last: Fitted | None = None

    def is_due(self, step: int) -> bool:
        return self._job.fit is not None and step % self._job.fit.every == 0

    def fit(self, step: int, mask: Mask, scorer: Scorer) -> tuple[Fitted, float, float]:
        """Fit the blocks that a step left. Returns the weights, the work in FLOPs and the seconds."""
        assert self._job.fit is not None
        start = time.perf_counter()
        replicas = FitScorer(scorer, mask)
        stages = self._stages(replicas)
        fitting = Fitting(
            scorer=replicas,
            stages=stages,
            weights=self._weights(stages),
            trials=[Trial(METHOD, IN_SEARCH_RIDGE)],
            parts=parts_of(self._job.fit.windows.num_windows),
            cost=self._job.fit.cost,
            run=step,
        )
        work = self._job.fit.flops
        changed: dict[Block, Weights] = {}
        for _, fitted in fitting.fit({}):
            changed |= fitted[0]
            self._telling.advance(work / len(stages))
        return Fitted(digest_of(changed), changed), work, time.perf_counter() - start

    def keep(self, fitted: Fitted) -> None:
        self._last = fitted
        path = self._path(fitted.digest)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as aside:
            write_changed(aside, [fitted.changed])

    def of(self, record: CompensationRecord, scorer: Scorer) -> Fitted:
        """Return the weights of an earlier refit: those in memory or in their file, or fitted again.

        Raises UserError if they are no longer the same.
        """
        if self._last is not None and self._last.digest == record.digest:
            return self._last
        try:
            (changed,) = read_changed(self._path(record.digest))
        except ValueError:  # missing or damaged
            changed = {}
        if digest_of(changed) == record.digest:
            self._last = Fitted(record.digest, changed)
            return self._last
        self._telling.note(f"the weights of the refit after step {record.step} are not there; fitting them again")
        found, _, _ = self.fit(record.step, Mask.parse(record.mask), scorer)
        if found.digest != record.digest:
            raise UserError(
                f"the refit after step {record.step} gives other weights than when {str(self._run.path)!r} was "
                f"written: the model, the library versions or the processor have changed. Resume the run where it "
                f"began, or choose another `out`."
            )
        self.keep(found)
        return found

    def _path(self, digest: str) -> Path:
        return self._run.path / FOLDER / f"{digest[:16]}.safetensors"

    def _stages(self, scorer: Scorer) -> Sequence[FittedStage]:
        (result,) = scorer.run([StagesUnit()])
        if isinstance(result, OutOfMemory):
            raise SearchFailed(f"the device does not have enough memory for {result.unit}: {result.reason}")
        stages: Sequence[FittedStage] = result.value[0]
        return stages

    def _weights(self, stages: Sequence[FittedStage]) -> Mapping[Block, Weights]:
        """Return the dense model's weights of the projections to fit."""
        return {
            block: weights_in(self._dense.get_submodule(name)).to(CPU, DTYPES[self._job.dtype])
            for stage in stages
            for block, name in zip(stage.blocks, stage.names, strict=True)
        }

    @cached_property
    def _dense(self) -> nn.Module:
        if self._job.decoder is not None:
            return self._job.decoder.model
        return load_model(self._job.model, stored_dtype(self._job.model))  # mapped from its files
