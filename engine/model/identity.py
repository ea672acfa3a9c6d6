"""Which model is this? Its name, and a fingerprint of its weights that a run, a checkpoint and a comparison record.

A fingerprint begins with its kind. Only fingerprints of one kind can be compared:

- `2:…` for a checkpoint folder: the config, code and index beside the weights, and of each weight file its name, its
  header (names, dtypes, shapes and places of all tensors) and samples from within every tensor. Tensors of up to 64 KiB
  are read whole, of larger ones 16 samples of 4 KiB. Training, merging, casting or replacing a tensor is seen; a few
  numbers edited by hand within a large tensor can be missed.
- `gguf:…` for a GGUF file: all of its bytes, whatever the dtype it is converted to.
- `live:DTYPE:…` for a model in memory: samples of every tensor.
- a commit for a hub id.

Before kinds existed a folder's fingerprint had none, and its samples were spread over each file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from transformers import PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.files import gguf_digest, gguf_file
from blockpruner.engine.model.hub import commit_of
from blockpruner.engine.model.loading import load_config
from blockpruner.engine.model.source import full_name, is_same_model
from blockpruner.engine.sections import ModelSource

FOLDER = "2:"
WHOLE_BYTES, NUM_SAMPLES, SAMPLE_BYTES = 2**16, 16, 2**12
NUM_PROBES, PROBE_BYTES = 256, 1024
"""Number and size of the samples of a file in a fingerprint without a kind."""
MAX_HEADER = 10**8
"""Largest header that safetensors reads, in bytes."""
COSMETIC = frozenset({"_name_or_path", "transformers_version"})
"""Keys of a config that change with the program that saved it."""


@dataclass(frozen=True)
class Identity:
    name: str
    """A hub id, `smollm2`, or the absolute path of a folder or file."""
    fingerprint: str | None
    """None if it is unknown, as in what earlier versions recorded."""

    @property
    def kind(self) -> str | None:
        return None if self.fingerprint is None else self.fingerprint.rpartition(":")[0]

    def is_same(self, other: Identity) -> bool:
        """Whether both are one model: by their fingerprints if these can be compared, else by their names."""
        if self.kind is not None and self.kind == other.kind:
            return self.fingerprint == other.fingerprint
        return is_same_model(self.name, other.name)

    @property
    def how_to_give(self) -> str:
        """What to tell a user who gave another model, or another commit of this one."""
        return "the same model" if self.kind != "" else f"`model={self.name}` and `revision={self.fingerprint}`"

    def at(self, source: ModelSource) -> ModelSource:
        """The source that was identified: a hub id at the very commit, also if its branch moves now."""
        return replace(source, revision=self.fingerprint) if self.kind == "" else source

    def __str__(self) -> str:
        return f"{self.name!r} ({self.fingerprint or 'of unknown fingerprint'})"


def identity(source: ModelSource) -> Identity:
    """Identify a model by its name. Raises UserError if there is no such model."""
    file = gguf_file(source.name)
    if file is not None:
        return Identity(full_name(source.name), f"gguf:{gguf_digest(file)[:16]}")
    return Identity(full_name(source.name), fingerprint(source))


def identity_in_memory(model: PreTrainedModel, name: str) -> Identity:
    """Identify a model in memory. name: what it is called."""
    digest = hashlib.sha256(repr(_plain(model.config.to_dict())).encode())
    for key, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(flat.numel(), SAMPLE_BYTES), dtype=torch.float64)
        sample = flat[places.long().to(flat.device)].cpu().contiguous().view(torch.uint8)
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} ".encode() + sample.numpy().tobytes())
    dtype = str(model.dtype).removeprefix("torch.")
    return Identity(full_name(name), f"live:{dtype}:{digest.hexdigest()[:16]}")


def fingerprint(source: ModelSource, like: str | None = None) -> str | None:
    """Return the fingerprint of a hub id (None if its commit is not known) or of a folder.

    like: a recorded fingerprint. The result is of its kind, so that the two can be compared.
    """
    folder = Path(source.name)
    if not folder.is_dir():
        load_config(source)  # reports a wrong name
        return commit_of(source)
    if not (folder / "config.json").is_file():
        raise UserError(f"expected a checkpoint folder with a config.json, got {source.name!r} without one.")
    try:
        return _sampled_by_file(folder) if like is not None and not like.startswith(FOLDER) else _sampled(folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source.name!r}: {error.strerror}.") from error


def _sampled(folder: Path) -> str:
    digest = hashlib.sha256(_config(folder / "config.json"))
    beside = [*folder.glob("*.py"), *folder.glob("*.safetensors.index.json")]
    for file in sorted(file for file in beside if file.is_file()):
        digest.update(f"{file.name} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    for file in _weight_files(folder):
        num_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header = _header(stream)
            digest.update(f"{file.name} {num_bytes} ".encode() + header)
            spans = _tensors(header, num_bytes) or [(len(header), num_bytes)]
            for first, length in _samples(spans):
                stream.seek(first)
                digest.update(stream.read(length))
    return f"{FOLDER}{digest.hexdigest()[:16]}"


def _config(file: Path) -> bytes:
    """Return what a config says, in one form however it is written."""
    text = file.read_bytes()
    try:
        values = json.loads(text)
        return json.dumps(_plain(values), sort_keys=True).encode()
    except (ValueError, RecursionError):  # loading it says what is wrong
        return text


def _plain(values: object) -> object:
    return {key: value for key, value in values.items() if key not in COSMETIC} if isinstance(values, dict) else values


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def _header(stream: BinaryIO) -> bytes:
    length = stream.read(8)
    return length + stream.read(min(int.from_bytes(length, "little"), MAX_HEADER))


def _tensors(header: bytes, num_bytes: int) -> list[tuple[int, int]]:
    """Return first and last byte of every tensor in the file, or nothing if this is no header of safetensors."""
    try:
        entries = json.loads(header[8:])
        offsets = sorted(entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__")
        spans = [(len(header) + first, len(header) + last) for first, last in offsets]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return spans if all(type(last) is int and 0 <= first <= last <= num_bytes for first, last in spans) else []


def _samples(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the length of each sample."""
    for first, last in spans:
        if last - first <= WHOLE_BYTES:
            yield first, max(0, last - first)
            continue
        for number in range(NUM_SAMPLES):
            yield first + number * (last - first - SAMPLE_BYTES) // (NUM_SAMPLES - 1), SAMPLE_BYTES


def _sampled_by_file(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = stream.read(8)
            header += stream.read(min(int.from_bytes(header, "little"), 2**27))
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode() + header)
            for place in range(NUM_PROBES):
                stream.seek(place * size // NUM_PROBES)
                digest.update(stream.read(PROBE_BYTES))
    return digest.hexdigest()[:16]
