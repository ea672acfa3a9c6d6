"""The methods that leave a model with other weights: it is written as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cluster.config import SearchConfig
from cluster.files import new_folder
from cluster.job import Job, prepare
from cluster.placement import local_cpus
from cluster.progress import Reporter
from engine.blocks import Block, Kind, Mask
from engine.checkpoint.grouped import SIDE_CAR
from engine.errors import UserError
from engine.loading import load_model, load_tokenizer
from engine.methods.laco import Collapse, laco
from engine.methods.slicegpt import check_sliceable, ratio_at, slicegpt, sparsity_for_ratio, width_of
from engine.shape import ModelShape

LACO = {"laco": Collapse(), "laco-code": Collapse(as_in_code=True)}
NUM_SENTENCES, SENTENCE_LEN = 5, 64
"""LaCo compares hidden states on a few short sentences: the beginnings of the first calibration windows."""


def check_rebuilt(name: str, model: PreTrainedModel, shape: ModelShape, ratio: float) -> None:
    """Raise UserError if a method does not fit the model, or does not reach the ratio. model: without weights."""
    most = 1.0
    if name in LACO:
        most = _ratio_of_layers(shape, shape.num_layers - 1)
    else:
        check_sliceable(model)
        most = max(ratio_at(model, width) for width in (8, model.config.hidden_size // 2))
    if ratio > most:
        raise UserError(f"expected --ratio of at most {most:.4f}, the largest that {name} reaches here, got {ratio}.")


def rebuild(
    name: str, config: SearchConfig, checkpoint: Path, ratio: float, reporter: Reporter, loaded: Callable[[], None]
) -> dict[str, Any]:
    """Write the model nearest to `ratio`. loaded: called before the first pass over the text."""
    torch.set_num_threads(config.threads_per_replica or local_cpus())
    job = prepare(config, reporter)
    dense = load_model(job.model, job.dtype, torch.device(job.device))
    loaded()
    with new_folder(checkpoint) as aside:
        model, details = _merge(dense, job, ratio, LACO[name]) if name in LACO else _slice(dense, job, ratio, reporter)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        reached = 1 - num_parameters / job.shape.num_parameters
        model.save_pretrained(aside)
        load_tokenizer(job.model).save_pretrained(aside)
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
        (aside / SIDE_CAR).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{key} {value}" for key, value in details.items() if key != "layers")
    reporter.say(f"{name}: {reached:.1%} removed ({shown})")
    return {"ratio": reached, **details}


def _merge(
    dense: PreTrainedModel, job: Job, ratio: float, collapse: Collapse
) -> tuple[PreTrainedModel, dict[str, Any]]:
    numbers = range(1, job.shape.num_layers)
    num_remove = min(numbers, key=lambda number: abs(_ratio_of_layers(job.shape, number) - ratio))
    sentences = job.windows.tokens[:NUM_SENTENCES, :SENTENCE_LEN]
    merged = laco(dense, sentences, num_remove=num_remove, collapse=collapse)
    return merged.model, {
        "layers": [list(sources) for sources in merged.layers],
        "threshold": merged.threshold,
        "similarity": merged.similarity,
    }


def _slice(
    dense: PreTrainedModel, job: Job, ratio: float, reporter: Reporter
) -> tuple[PreTrainedModel, dict[str, Any]]:
    sparsity = sparsity_for_ratio(dense, ratio)
    with reporter.bar("slicing", job.shape.num_layers):
        sliced = slicegpt(dense, job.windows.tokens, sparsity=sparsity, on_layer=lambda: reporter.advance(1))
    return sliced.model, {"sparsity": sparsity, "width": width_of(sparsity, job.shape.hidden_size)}


def _ratio_of_layers(shape: ModelShape, number: int) -> float:
    """Of so many average layers."""
    layers = Mask.of(Block(Kind.LAYER, layer) for layer in range(shape.num_layers))
    return shape.ratio(layers) * number / shape.num_layers
