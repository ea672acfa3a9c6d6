"""The methods that leave a model with other weights: it is written as a checkpoint."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.comparing.alone import alone
from blockpruner.engine.checkpoint.grouped import write_checkpoint
from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.laco import (
    Collapse,
    check_mergeable,
    laco,
    most_removed,
    num_layers_for_ratio,
    ratio_of,
)
from blockpruner.engine.methods.slicegpt import MULTIPLE, check_sliceable, ratio_at, slicegpt, sparsity_for_ratio
from blockpruner.engine.model.loading import load_model, load_tokenizer
from blockpruner.engine.work.shape import ModelShape
from blockpruner.files import new_folder
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import Job
from blockpruner.showing.console import Reporter

LACO = {"laco": Collapse(), "laco-code": Collapse(as_in_code=True)}
CANDIDATES_PER_LINE = 20
NUM_SENTENCES, SENTENCE_LEN = 5, 64
"""LaCo compares hidden states on a few short sentences: the beginnings of the first calibration windows."""


def check_rebuilt(name: str, model: PreTrainedModel, shape: ModelShape, ratio: float) -> None:
    """Raise UserError if a method does not fit the model, or does not reach the ratio. model: without weights."""
    if name in LACO:
        check_mergeable(model, LACO[name])
        most = ratio_of(shape, most_removed(shape.num_layers, LACO[name]))
    else:
        check_sliceable(model)
        most = ratio_at(model, MULTIPLE)
    if ratio > most:
        raise UserError(f"expected --ratio of at most {most:.4f}, the largest that {name} reaches here, got {ratio}.")


def rebuild(
    name: str, config: SearchConfig, checkpoint: Path, ratio: float, reporter: Reporter, loaded: Callable[[], None]
) -> dict[str, Any]:
    """Write the model nearest to `ratio`; return its ratio, the work, and what else the method tells. loaded: called
    before the first pass over the text."""
    shutil.rmtree(checkpoint, ignore_errors=True)  # of a process that was killed before it could say how it went
    with alone(name, config, reporter) as job, new_folder(checkpoint) as aside:
        dense = load_model(job.model, job.dtype, torch.device(job.device))
        loaded()
        model, work_flops, details = (
            _merge(dense, job, ratio, LACO[name], reporter) if name in LACO else _slice(dense, job, ratio, reporter)
        )
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        reached = 1 - num_parameters / job.shape.num_parameters
        provenance = {
            "format": name,
            "base_model": config.model,
            "revision": config.revision,
            "dtype": job.dtype,
            "num_parameters": num_parameters,
            "num_parameters_dense": job.shape.num_parameters,
            "ratio": reached,
            **details,
            "blockpruner": version("blockpruner"),
        }
        write_checkpoint(model, load_tokenizer(job.model), provenance, aside)
    shown = ", ".join(f"{key} {value}" for key, value in details.items() if key != "layers")
    reporter.say(f"{name}: {reached:.1%} removed ({shown})")
    return {"ratio": reached, "work_flops": work_flops, **details}


def _merge(
    dense: PreTrainedModel, job: Job, ratio: float, collapse: Collapse, reporter: Reporter
) -> tuple[PreTrainedModel, int, dict[str, Any]]:
    num_remove = num_layers_for_ratio(job.shape, ratio, collapse)
    sentences = job.windows.tokens[:NUM_SENTENCES, :SENTENCE_LEN]
    num_compared = itertools.count(1)

    def tell() -> None:  # how many there will be is not known
        if (number := next(num_compared)) % CANDIDATES_PER_LINE == 0:
            reporter.say(f"{number} candidates compared with the dense model")

    merged = laco(dense, sentences, num_remove=num_remove, collapse=collapse, on_candidate=tell)
    return (
        merged.model,
        merged.work_flops,
        {
            "layers": [list(sources) for sources in merged.layers],
            "threshold": merged.threshold,
            "similarity": merged.similarity,
        },
    )


def _slice(
    dense: PreTrainedModel, job: Job, ratio: float, reporter: Reporter
) -> tuple[PreTrainedModel, int, dict[str, Any]]:
    sparsity = sparsity_for_ratio(dense, ratio)
    with reporter.bar("slicing", job.shape.num_layers):
        sliced = slicegpt(dense, job.windows.tokens, sparsity=sparsity, on_layer=lambda: reporter.advance(1))
    return sliced.model, sliced.work_flops, {"sparsity": sparsity, "width": sliced.width}
