"""An oracle that remembers scores: a score that one strategy asked for is free for the next, but counts as its work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.kept import Kept
from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.score import Score
from blockpruner.engine.scoring.forked import ForkedPass
from blockpruner.engine.search.oracle import Round, Step
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import sweep_flops, window_groups, windows_per_row
from blockpruner.searching.ledger import parse_ledger


def model_header(source: ModelSource, dtype: str) -> dict[str, str]:
    """Return what sums depend on besides metric and windows. source: as `materialize` returns it."""
    return {"model": fingerprint(source) or "unknown", "dtype": dtype}


class Memory:
    def __init__(
        self,
        forked: ForkedPass,
        shape: ModelShape,
        windows: Tensor,
        metric: Metric = PPL,
        file: Path | None = None,
        made_of: dict[str, str] | None = None,
    ) -> None:
        """windows: token ids [num_windows, seq_len]. file: where sums are kept between runs.
        made_of: of `model_header`, with a file. Raises UserError if the file has sums of another model, dtype, metric
        or windows."""
        self._forked = forked
        self._shape = shape
        self._windows = windows
        self._metric = metric
        self._sums: dict[tuple[Mask, int], float] = {}
        self._kept: Kept | None = None
        if file is not None:
            assert made_of is not None
            header = {**made_of, "metric": metric.name, "windows": Windows(windows, 0).fingerprint}
            self._kept = Kept(file, header)
            for mask, sums in self._kept.lines:
                self._sums.update({(Mask.parse(mask), int(window)): value for window, value in sums.items()})
        self.groups = window_groups(len(windows), windows_per_row(windows.shape[1]))
        self.forget_work()

    def forget_work(self) -> None:
        self.work_flops = self.naive_flops = 0
        self.work_at: list[int] = []
        """Work up to each removal."""

    def learn(self, ledger: Path) -> None:
        """Read the sums that a search recorded on the same windows."""
        for line in parse_ledger(ledger)[0]:
            if line["type"] == "unit":
                for mask, row in zip(line["masks"], line["sums"], strict=True):
                    windows = range(line["first"], line["stop"])
                    known = zip(windows, (math.nan if value is None else value for value in row), strict=True)
                    self._sums.update({(Mask.parse(mask), window): value for window, value in known})

    @property
    def dense(self) -> Score:
        work = self.work_flops
        score = self.score([Mask()])[0]
        self.work_flops = work
        return score

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        seq_len = self._windows.shape[1]
        for group in groups or self.groups:
            self.work_flops += len(group) * sweep_flops(masks, self._shape, seq_len, self._metric)
            missing = [mask for mask in dict.fromkeys(masks) if (mask, group.start) not in self._sums]
            if missing:
                windows = self._windows[group.start : group.stop]
                sums = self._forked.window_sums(missing, windows, self._metric).tolist()
                for mask, row in zip(missing, sums, strict=True):
                    self._sums.update({(mask, w): v for w, v in zip(group, row, strict=True)})
                if self._kept is not None:
                    rows = zip(missing, sums, strict=True)
                    self._kept.append([str(mask), dict(zip(group, row, strict=True))] for mask, row in rows)
        asked = [window for group in groups or self.groups for window in group]
        return [Score(mask, tuple(self._sums[mask, window] for window in asked), seq_len - 1) for mask in masks]

    def removed(self, step: Step) -> Score:
        self.work_at.append(self.work_flops)
        self._count(candidate.mask for candidate in step.candidates)
        return step.score

    def judged(self, judged: Round) -> None:
        self._count(judged.masks)

    def _count(self, masks: Iterable[Mask]) -> None:
        num_windows, seq_len = self._windows.shape
        self.naive_flops += num_windows * sum(self._shape.forward_flops(mask, seq_len) for mask in masks)
