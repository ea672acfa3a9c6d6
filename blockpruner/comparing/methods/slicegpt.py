"""SliceGPT (arXiv 2401.15024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.comparing.rebuilt import Built, Rebuilt
from blockpruner.engine.errors import UserError
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.searching.resolving import Job


class SliceGpt(Rebuilt):
    name = "slicegpt"
    about = "rotates the residual stream and reduces the hidden size (arXiv 2401.15024)"

    def check(self, told: SearchConfig, model: PreTrainedModel, shape: ModelShape) -> None:
        from blockpruner.engine.methods.slicegpt import MULTIPLE, check_sliceable, ratio_at

        check_sliceable(model)
        most = ratio_at(model, MULTIPLE)
        if told.ratio is not None and told.ratio > most:
            raise UserError(
                f"expected `ratio` of at most {most:.4f}, the largest that {self.name} reaches here, got {told.ratio}."
            )

    def build(self, dense: PreTrainedModel, job: Job, ratio: float, reporter: Reporter) -> Built:
        from blockpruner.engine.methods.slicegpt import slicegpt, sparsity_for_ratio

        sparsity = sparsity_for_ratio(dense, ratio)
        with reporter.bar("slicing", job.shape.num_layers):
            sliced = slicegpt(dense, job.windows.tokens, sparsity=sparsity, on_layer=lambda: reporter.advance(1))
        return Built(sliced.model, sliced.work_flops, {"sparsity": sparsity, "width": sliced.width})
