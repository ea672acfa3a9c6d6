"""Changed weights as a file, with a digest that shows damage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockpruner.engine.blocks import Block
from blockpruner.engine.compensation.projections import Weights
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.errors import UserError


def write_changed(path: Path, changes: Sequence[Changed]) -> None:
    """Write the changed weights of some trials."""
    tensors = _tensors(changes)
    save_file(tensors, path, metadata={"trials": str(len(changes)), "sha256": _digest(tensors)})


def read_changed(path: Path) -> list[Changed]:
    """Read the changed weights of some trials. Raises ValueError if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(tensors) != metadata["sha256"]:
            raise ValueError("another content")
        changes: list[dict[Block, Weights]] = [{} for _ in range(int(metadata["trials"]))]
        for name, tensor in tensors.items():
            trial, block, kind = name.split(" ")
            if kind == "weight":
                changes[int(trial)][Block.parse(block)] = Weights(tensor, tensors.get(f"{trial} {block} bias"))
    except (OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError, UserError) as error:
        raise ValueError(str(error)) from error
    return list(changes)


def digest_of(changed: Changed) -> str:
    """SHA-256 of changed weights: names, shapes, dtypes and bits."""
    return _digest(_tensors([changed]))


def _tensors(changes: Sequence[Changed]) -> dict[str, Tensor]:
    tensors = {}
    for trial, changed in enumerate(changes):
        for block, weights in changed.items():
            tensors[f"{trial} {block} weight"] = weights.weight.contiguous()
            if weights.bias is not None:
                tensors[f"{trial} {block} bias"] = weights.bias.contiguous()
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
