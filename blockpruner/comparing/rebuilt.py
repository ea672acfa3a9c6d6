"""Methods that produce a model with new weights, written as a checkpoint."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.comparing.method import Clock, Method
from blockpruner.engine.errors import UserError
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.searching.resolving import Job


@dataclass(frozen=True)
class Built:
    model: PreTrainedModel
    work_flops: int
    """FLOPs of all matmuls."""
    details: dict[str, Any]
    """Additional values to record."""


class Rebuilt(Method):
    rebuilds = True
    is_nested = False

    @abstractmethod
    def build(self, dense: PreTrainedModel, job: Job, ratio: float, reporter: Reporter) -> Built:
        """Build the model whose share of removed parameters is closest to `ratio`."""

    def told(self, common: SearchConfig, num_layers: int) -> SearchConfig:
        return common

    def run(self, told: SearchConfig, folder: Path, reporter: Reporter, clock: Clock) -> dict[str, Any]:
        import torch

        from blockpruner.comparing.alone import alone
        from blockpruner.engine.checkpoint.grouped import write_checkpoint
        from blockpruner.engine.checkpoint.provenance import base_of
        from blockpruner.engine.model.decoder import Decoder
        from blockpruner.engine.model.decoder_check import check_removable
        from blockpruner.engine.model.loading import load_model, load_tokenizer
        from blockpruner.files import new_folder

        assert told.ratio is not None
        checkpoint = folder / "checkpoint"
        shutil.rmtree(checkpoint, ignore_errors=True)  # left by a process that was killed
        here = told.replace(ratio=None, num_remove=1)  # the limits of a search do not apply to this method
        with alone(self.name, here, reporter) as job, new_folder(checkpoint) as aside:
            dense = load_model(job.model, job.dtype, torch.device(job.device))
            check_removable(Decoder(dense))
            clock.loaded()
            built = self.build(dense, job, told.ratio, reporter)
            num_parameters = sum(parameter.numel() for parameter in built.model.parameters())
            reached = 1 - num_parameters / job.shape.num_parameters
            provenance = {
                "format": self.name,
                **base_of(job.identity, told.revision),
                "dtype": job.dtype,
                "num_parameters": num_parameters,
                "num_parameters_dense": job.shape.num_parameters,
                "ratio": reached,
                **built.details,
                "blockpruner": version("blockpruner"),
            }
            write_checkpoint(built.model, load_tokenizer(job.model), provenance, aside, job.model)
        shown = ", ".join(f"{key} {value}" for key, value in built.details.items() if key != "layers")
        reporter.say(f"{self.name}: {reached:.1%} removed ({shown})")
        return {
            "ratio": reached, "work_flops": built.work_flops, **built.details, "search_s": clock.search_s(),
        }  # fmt: skip


class FewerLayers(Rebuilt):
    """Removes whole layers, at most all but one, and changes weights of the others."""

    def num_layers(self, shape: ModelShape, ratio: float) -> int:
        """Return the number of layers to remove."""
        from blockpruner.engine.methods.fewer_layers import num_layers_for_ratio

        return num_layers_for_ratio(shape, ratio, shape.num_layers - 1)

    def check(self, told: SearchConfig, model: PreTrainedModel, shape: ModelShape) -> None:
        from blockpruner.engine.methods.fewer_layers import ratio_of

        if told.ratio is not None and told.ratio > (most := ratio_of(shape, shape.num_layers - 1)):
            raise UserError(
                f"expected `ratio` of at most {most:.4f}, the largest that {self.name} reaches here, got {told.ratio}."
            )
