"""ReplaceMe (arXiv 2505.02819): a run of layers becomes a linear map in the MLP before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.comparing.rebuilt import Built, FewerLayers
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.searching.resolving import Job


class ReplaceMe(FewerLayers):
    name = "replaceme"
    about = "replaces neighbouring layers by a linear map, which the MLP before them takes up (arXiv 2505.02819)"

    def build(self, dense: PreTrainedModel, job: Job, ratio: float, reporter: Reporter) -> Built:
        from blockpruner.engine.methods.replaceme import replaceme
        from blockpruner.engine.model.decoder import Decoder

        number = self.num_layers(job.shape, ratio)
        with reporter.bar("layers and linear map", 2 * job.windows.num_windows):
            found = replaceme(
                Decoder(dense), job.windows.tokens, num_remove=number, on_window=lambda: reporter.advance(1)
            )
        return Built(found.model, found.work_flops, {"layers": found.layers, "distance": found.distance})
