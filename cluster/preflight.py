"""Checks what must be equal on all nodes because it can change scores: versions, the model and the kind of device."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.sections import ModelSource

PACKAGES = ("ray", "torch", "transformers", "tokenizers", "lm_eval")


@dataclass(frozen=True)
class Survey:
    """What Python finds on a node."""

    python: str
    ray: str
    torch: str
    transformers: str
    tokenizers: str
    lm_eval: str
    blockpruner: str
    """Version and a digest of the source code."""
    model: str
    """Fingerprint of the model, or the reason why it cannot be read."""
    hardware: tuple[str, ...]
    """Names of the compute devices."""
    device_bytes: int | None
    """Memory of the smallest GPU; None without a GPU."""


def survey(model: ModelSource, device: str) -> Survey:
    return Survey(
        python=platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        blockpruner=f"{version('blockpruner')} ({_source_digest()})",
        model=_fingerprint(model),
        hardware=hardware(device),
        device_bytes=device_bytes(device),
    )


def differences(reference: Survey, other: Survey, *, allow_mixed: bool) -> list[str]:
    """Describe what prevents two nodes from working on one run. allow_mixed: ignore differences in devices."""
    mine, theirs = asdict(reference), asdict(other)
    unlike = [name for name in mine if name not in ("device_bytes", "hardware") and mine[name] != theirs[name]]
    if not allow_mixed and not set(other.hardware) <= set(reference.hardware):
        unlike.append("hardware")
    return [f"{name} is {theirs[name]!r} there and {mine[name]!r} elsewhere" for name in unlike]


def check(surveys: Mapping[str, Survey], *, allow_mixed: bool) -> None:
    """Raise UserError with the nodes and their differences unless all nodes are equal. surveys: by node name."""
    names = list(surveys)
    for name in names:
        if surveys[name].model.startswith("error"):
            raise UserError(f"node {name} cannot read the model: {surveys[name].model.partition(': ')[2]}")
    check_one_kind({name: found.hardware for name, found in surveys.items()}, allow_mixed=allow_mixed)
    found = {name: differences(surveys[names[0]], surveys[name], allow_mixed=True) for name in names[1:]}
    if unlike := {name: what for name, what in found.items() if what}:
        listed = "; ".join(f"{name}: {', '.join(what)}" for name, what in unlike.items())
        raise UserError(f"nodes differ from {names[0]}: {listed}; make them equal.")


def check_one_kind(kinds: Mapping[str, tuple[str, ...]], *, allow_mixed: bool) -> None:
    """Raise UserError if there is more than one kind of device. kinds: by node name."""
    if not allow_mixed and len({kind for found in kinds.values() for kind in found}) > 1:
        listed = "; ".join(f"{name}: {', '.join(found)}" for name, found in kinds.items())
        raise UserError(
            f"expected one kind of device, got {listed}; `allow_mixed` permits this, but scores can then depend on "
            f"which node computes them."
        )


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    # `engine` and `cluster` are links in a checkout and folders in a built package. With followlinks both are found.
    folders = os.walk(root, followlinks=True)
    files = [Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")]
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _fingerprint(model: ModelSource) -> str:
    try:
        return fingerprint(model) or "unknown"
    except UserError as error:
        return f"error: {error}"


def hardware(device: str) -> tuple[str, ...]:
    """Return the names of the devices that this process sees."""
    if device == "cuda":
        return tuple(sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return tuple(sorted(names)) or (platform.processor(),)


def device_bytes(device: str) -> int | None:
    """Return the memory of the smallest GPU that this process sees; None for a CPU."""
    if device != "cuda":
        return None
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes, default=None)
