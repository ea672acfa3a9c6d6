"""Reads GGUF: the metadata, and the tensors as they are stored.

`gguf.GGUFReader` trusts the counts in a file, so that a damaged one keeps it busy for ever, and is slow. Here every
length is checked against the size of the file first.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType as Value

from blockpruner.engine.errors import UserError
from blockpruner.engine.plain_file import GIT_LFS

Array = np.ndarray[Any, Any]
Fields = dict[str, tuple[Any, Value, Value | None]]
"""Metadata: each value with its type and, for arrays, the type of the items."""

VERSIONS = (2, 3)
FORMATS = {
    Value.UINT8: "B", Value.INT8: "b", Value.UINT16: "H", Value.INT16: "h", Value.UINT32: "I", Value.INT32: "i",
    Value.FLOAT32: "f", Value.BOOL: "?", Value.UINT64: "Q", Value.INT64: "q", Value.FLOAT64: "d",
}  # fmt: skip
"""Codes of the `struct` module."""
PLAIN = {Type.F32: np.float32, Type.F16: np.float16}
"""Types that numpy knows. The data of other types are rows of bytes."""
MAX_DIMENSIONS = 4
LONGEST_NAME = 200
SMALLEST_FIELD, SMALLEST_TENSOR = 13, 24
"""Bytes that a field and the description of a tensor take at least."""


@dataclass(frozen=True)
class Raw:
    """A tensor as stored in a file: rows of values, or rows of bytes if it is quantised."""

    data: Array
    type: Type

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        shape = self.data.shape
        return tuple(shape if self.type in PLAIN else gguf.quant_shape_from_byte_shape(shape, self.type))

    @property
    def values(self) -> Array:
        """The values in float32."""
        return gguf.quants.dequantize(self.data, self.type)


@dataclass(frozen=True)
class Content:
    """What is in a GGUF, under the names of the tensors there."""

    fields: Fields
    tensors: dict[str, Raw]


class _Damaged(Exception):
    """The file is no GGUF as the format's description has it. The message says where."""


def read_gguf(file: Path) -> Content:
    """Read a GGUF; the tensors' data are mapped, not loaded. Raises UserError for a file that is none, in one line."""
    try:
        return _Reader(file).content()
    except _Damaged as error:
        raise UserError(
            f"cannot read {str(file)!r} as GGUF: {error}; expected a complete little-endian GGUF of version 2 or 3, so "
            f"download or convert it again."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r} as GGUF: {error.strerror or type(error).__name__}.") from error


class _Reader:
    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            begin = stream.read(24)
            self.size = os.fstat(stream.fileno()).st_size
        if begin.startswith(GIT_LFS):
            raise _Damaged("it is a Git LFS pointer, not the file itself")
        if begin[:4] != b"GGUF":
            raise _Damaged("it is empty" if not begin else "it does not begin with 'GGUF'")
        if len(begin) < 24:
            raise _Damaged("it ends within its first 24 bytes")
        self.bytes = np.memmap(file, mode="r")
        self.place = 4

    def content(self) -> Content:
        version = self.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            raise _Damaged("it is big-endian" if swapped in VERSIONS else f"it is of version {version}")
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        self.need(num_fields * SMALLEST_FIELD + num_tensors * SMALLEST_TENSOR, "its table of contents")
        fields: Fields = {}
        for _ in range(num_fields):
            name = self.name("a field's name")
            if name in fields:
                raise _Damaged(f"it has the field {name} twice")
            fields[name] = self.field(name)
        found = [self.tensor() for _ in range(num_tensors)]
        return Content(fields, self.data(found, _alignment(fields)))

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.size - self.place:
            raise _Damaged(f"it ends before the end of {what}")

    def numbers(self, code: str, count: int, what: str) -> list[Any]:
        self.need(count * struct.calcsize(code), what)
        values = struct.unpack_from(f"<{count}{code}", self.bytes.data, self.place)
        self.place += count * struct.calcsize(code)
        return list(values)

    def number(self, code: str, what: str = "its table of contents") -> int:
        return int(self.numbers(code, 1, what)[0])

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        self.need(length, what)
        raw = self.bytes[self.place : self.place + length].tobytes()
        self.place += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"{what} is no UTF-8") from error

    def name(self, what: str) -> str:
        name = self.text(what)
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise _Damaged(f"{what} is no name")
        return name

    def kind(self, name: str) -> Value:
        number = self.number("I", f"the field {name}")
        try:
            return Value(number)
        except ValueError as error:
            raise _Damaged(f"the field {name} is of the unknown type {number}") from error

    def field(self, name: str) -> tuple[Any, Value, Value | None]:
        kind, what = self.kind(name), f"the field {name}"
        if kind == Value.STRING:
            return self.text(what), kind, None
        if kind != Value.ARRAY:
            return self.numbers(FORMATS[kind], 1, what)[0], kind, None
        item, count = self.kind(name), self.number("Q", what)
        if item == Value.ARRAY:
            raise _Damaged(f"the field {name} is an array of arrays")
        if item != Value.STRING:
            return self.numbers(FORMATS[item], count, what), kind, item
        self.need(count * 8, what)
        return [self.text(what) for _ in range(count)], kind, item

    def tensor(self) -> tuple[str, tuple[int, ...], Type, int]:
        """Return name, shape in the order of torch, type, and the place of the data."""
        name = self.name("a tensor's name")
        num_dimensions = self.number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise _Damaged(f"the tensor {name} has {num_dimensions} dimensions")
        shape = tuple(reversed(self.numbers("Q", num_dimensions, "its table of contents")))
        number = self.number("I")
        if number not in GGML_QUANT_SIZES:
            raise _Damaged(f"the tensor {name} is of the type {number}, which the `gguf` package does not know")
        if 0 in shape or shape[-1] % GGML_QUANT_SIZES[Type(number)][0]:
            raise _Damaged(f"the tensor {name} of type {Type(number).name} has the shape {list(shape)}")
        return name, shape, Type(number), self.number("Q")

    def data(self, found: list[tuple[str, tuple[int, ...], Type, int]], alignment: int) -> dict[str, Raw]:
        def aligned(place: int) -> int:
            return (place + alignment - 1) // alignment * alignment

        tensors: dict[str, Raw] = {}
        start = aligned(self.place)
        expected = 0
        for name, shape, kind, offset in found:
            if name in tensors:
                raise _Damaged(f"it has the tensor {name} twice")
            if offset != expected:
                raise _Damaged(f"the tensor {name} is at {offset} instead of {expected}")
            block, num_bytes = GGML_QUANT_SIZES[kind]
            length = int(np.prod([int(size) for size in shape], dtype=object)) // block * num_bytes
            self.place = start + offset
            self.need(length, f"the tensor {name}")
            raw = self.bytes[self.place : self.place + length]
            if kind in PLAIN:
                tensors[name] = Raw(raw.view(PLAIN[kind]).reshape(shape), kind)
            else:
                tensors[name] = Raw(raw.reshape(gguf.quant_shape_to_byte_shape(shape, kind)), kind)
            expected = aligned(offset + length)
        return tensors


def _alignment(fields: Fields) -> int:
    value, kind, _ = fields.get("general.alignment", (gguf.GGUF_DEFAULT_ALIGNMENT, Value.UINT32, None))
    if kind != Value.UINT32 or value < 1 or value & (value - 1):
        raise _Damaged(f"the field general.alignment is {value!r}, which is no power of two")
    return int(value)
