"""The safetensors files of a model's folder: which ones are read, and what their headers say. No weights are read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.json_object import read_object
from blockpruner.engine.plain_file import check_file, check_kind

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes that weights can have, by their names in safetensors."""
ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
COUNTS = ("I64", "I32", "BOOL")
"""Dtypes of buffers such as positions and masks."""
HARMLESS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|masked_bias|embed_positions\.weights)$"
)
"""Buffers that older versions of transformers saved and that models compute by themselves."""
MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
"""A causal mask in checkpoints of older versions, if its shape is [1, 1, T, T]."""
EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE.get(self.dtype, 0)


class _Index(BaseModel):
    metadata: dict[str, Any]
    weight_map: dict[str, str] = Field(min_length=1)


def is_harmless(name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether a model loses nothing if it does not use this tensor."""
    is_mask = shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(HARMLESS.search(name)) or (is_mask and bool(MASK.search(name)))


def has_weights(folder: Path) -> bool:
    """Whether a folder has anything that looks like weights."""
    return lexists(folder / INDEX) or any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin", "*.pth"))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors that loading this folder reads, from the headers alone. Raises UserError for files that are
    missing, damaged or not named by the index, for tensors that are in two files, and for dtypes that are no floats."""
    files, named = _files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in found:
                raise UserError(
                    f"expected every tensor once in {str(folder)!r}, got {name!r} in {found[name].file!r} and in "
                    f"{file.name!r}; delete the file that does not belong to the model."
                )
            found[name] = tensor
    if absent := sorted(named - found.keys()):
        raise UserError(
            f"expected the tensors that {INDEX} names, but {len(absent)} of them are in none of its files, "
            f"{absent[0]!r} among them; download {str(folder)!r} again."
        )
    _check_dtypes(folder, found)
    _check_experts(folder, found)
    return found


def most_common_dtype(tensors: Iterable[Stored]) -> str | None:
    """Return the dtype in which most bytes are stored, or None if there are no floats."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.num_bytes
    return sizes.most_common(1)[0][0] if sizes else None


def files_left_out(folder: Path) -> list[str]:
    """Names of the safetensors files beside those that are read, such as a copy in another layout."""
    read = {file.name for file in _files(folder)[0]}
    return sorted(file.name for file in folder.glob("*.safetensors") if file.name not in read)


def _files(folder: Path) -> tuple[list[Path], frozenset[str]]:
    """Return the files to read, and the tensors that the index names."""
    single, index = folder / SINGLE, folder / INDEX
    if lexists(single) and lexists(index):
        raise UserError(
            f"expected either {SINGLE} or {INDEX} in {str(folder)!r}, found both, and they may hold different models; "
            f"delete the one that does not belong there."
        )
    shards = sorted(file for file in folder.glob("*.safetensors") if SHARD.fullmatch(file.name))
    if lexists(single):
        _check_all_read(folder, shards, [])
        return [single], frozenset()
    if lexists(index):
        named, tensors = _read_index(index)
        _check_all_read(folder, shards, named)
        return named, tensors
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        raise UserError(f"expected {INDEX} beside the shards in {str(folder)!r}, found none; download it too.")
    if others:
        raise UserError(f"expected weights as {SINGLE} in {str(folder)!r}, found {others[0]!r}; rename it.")
    is_pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
    found = "only pickled weights (*.bin)" if is_pickled else "none"
    what = "; load the model with transformers and save it again" if is_pickled else ""
    raise UserError(f"expected weights as *.safetensors in {str(folder)!r}, found {found}{what}.")


def _check_all_read(folder: Path, shards: list[Path], named: list[Path]) -> None:
    if left := [shard.name for shard in shards if shard not in named]:
        why = f"which {INDEX} does not name" if named else f"beside {SINGLE}"
        raise UserError(
            f"expected every shard in {str(folder)!r} to belong to the model, found {left[0]!r}, {why}; delete it, or "
            f"download {INDEX} again."
        )


def _read_index(index: Path) -> tuple[list[Path], frozenset[str]]:
    try:
        found = _Index.model_validate(read_object(index))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"expected 'metadata' and 'weight_map', a map from tensors to files, in {str(index)!r}, got another "
            f"{place!r}; download it again."
        ) from error
    names = sorted(set(found.weight_map.values()))
    for name in names:
        if PurePosixPath(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"expected {str(index)!r} to name *.safetensors files in its own folder, got {name!r}; download it "
                f"again."
            )
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if not lexists(file)]:
        raise UserError(
            f"expected the {len(files)} files that {INDEX} names in {str(index.parent)!r}, but {len(missing)} are "
            f"missing, {missing[0]!r} among them; download them too."
        )
    return files, frozenset(found.weight_map)


def _header(file: Path) -> dict[str, Stored]:
    check_kind(file)
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: Stored(part.get_dtype(), tuple(part.get_shape()), file.name) for name, part in slices.items()}
    except Exception as error:  # a parser of another project over a file that may hold anything
        check_file(file)  # a pointer, an empty file and one without permission have words of their own
        raise UserError(
            f"cannot load the weights of {str(file.parent)!r}: {file.name!r} is cut short or damaged "
            f"({first_line(error)}); download it again."
        ) from error


def _check_dtypes(folder: Path, tensors: dict[str, Stored]) -> None:
    odd = {name: tensor for name, tensor in tensors.items() if tensor.dtype not in FLOATS}
    for name, tensor in odd.items():
        is_count = tensor.dtype in COUNTS and not name.endswith("weight")
        if not is_count and not is_harmless(name, tensor.shape):
            raise UserError(
                f"expected weights in {', '.join(FLOATS.values())} in {str(folder)!r}, got {name!r} in {tensor.dtype}, "
                f"as quantised checkpoints have it; give the unquantised checkpoint."
            )


def _check_experts(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError unless experts that are stored one by one are numbered from 0: transformers stacks them in their
    order, so after a gap each would take the place of another."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            numbers.setdefault(f"{match[1]}*{match[3]}", set()).add(int(match[2]))
    for name, found in numbers.items():
        if len(found) != max(found) + 1:
            gap = min(set(range(len(found))) - found)
            raise UserError(
                f"expected experts numbered from 0 without a gap in {str(folder)!r}, got {name!r} without {gap}; "
                f"download it again."
            )
