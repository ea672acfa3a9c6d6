"""LaCo (arXiv 2402.11187), with the merge formula of its paper and with that of its published code."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar

from blockpruner.comparing.rebuilt import Built, Rebuilt
from blockpruner.engine.errors import UserError
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.engine.methods.laco import Collapse
    from blockpruner.searching.resolving import Job

CANDIDATES_PER_LINE = 20
NUM_SENTENCES, SENTENCE_LEN = 5, 64
"""LaCo compares hidden states on a few short sentences. These are the beginnings of the first calibration windows."""


class LaCo(Rebuilt):
    name = "laco"
    about = "merges layers into the one before them by the formula of its paper (arXiv 2402.11187)"
    as_in_code: ClassVar[bool] = False

    @property
    def collapse(self) -> Collapse:
        from blockpruner.engine.methods.laco import Collapse

        return Collapse(as_in_code=self.as_in_code)

    def check(self, told: SearchConfig, model: PreTrainedModel, shape: ModelShape) -> None:
        from blockpruner.engine.methods.fewer_layers import ratio_of
        from blockpruner.engine.methods.laco import check_mergeable, most_removed

        check_mergeable(model, self.collapse)
        most = ratio_of(shape, most_removed(shape.num_layers, self.collapse))
        if told.ratio is not None and told.ratio > most:
            raise UserError(
                f"expected `ratio` of at most {most:.4f}, the largest that {self.name} reaches here, got {told.ratio}."
            )

    def build(self, dense: PreTrainedModel, job: Job, ratio: float, reporter: Reporter) -> Built:
        from blockpruner.engine.methods.fewer_layers import num_layers_for_ratio
        from blockpruner.engine.methods.laco import laco, most_removed

        num_remove = num_layers_for_ratio(job.shape, ratio, most_removed(job.shape.num_layers, self.collapse))
        sentences = job.windows.tokens[:NUM_SENTENCES, :SENTENCE_LEN]
        num_compared = itertools.count(1)

        def tell() -> None:  # the total number is not known
            if (number := next(num_compared)) % CANDIDATES_PER_LINE == 0:
                reporter.say(f"{number} candidates compared with the dense model")

        merged = laco(dense, sentences, num_remove=num_remove, collapse=self.collapse, on_candidate=tell)
        layers = [list(sources) for sources in merged.layers]
        details = {"layers": layers, "threshold": merged.threshold, "similarity": merged.similarity}
        return Built(merged.model, merged.work_flops, details)


class LaCoCode(LaCo):
    name = "laco-code"
    about = "like laco, but merges as its published code does"
    as_in_code = True
