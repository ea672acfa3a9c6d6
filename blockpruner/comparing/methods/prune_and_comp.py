"""Prune&Comp (arXiv 2507.18212): layers go one by one, and the stream is brought back to its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.comparing.rebuilt import Built, FewerLayers
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.searching.resolving import Job


class PruneAndComp(FewerLayers):
    name = "prune-and-comp"
    about = "removes layers by block influence, one by one, and rescales the others after each (arXiv 2507.18212)"

    def build(self, dense: PreTrainedModel, job: Job, ratio: float, reporter: Reporter) -> Built:
        from blockpruner.engine.methods.prune_and_comp import prune_and_comp
        from blockpruner.engine.model.decoder import Decoder

        number = self.num_layers(job.shape, ratio)
        with reporter.bar("block influence", number * job.windows.num_windows):
            found = prune_and_comp(
                Decoder(dense), job.windows.tokens, num_remove=number, on_window=lambda: reporter.advance(1)
            )
        return Built(found.model, found.work_flops, {"removed": found.removed, "factors": found.factors})
