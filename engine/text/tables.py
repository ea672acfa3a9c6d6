"""Read one column of a table: Parquet files, Arrow files, and folders that `datasets` wrote with `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets.features.features import decode_nested_example, require_decoding
from pydantic import BaseModel, Field, ValidationError

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.text.files import MAX_BYTES, MAX_ROW, check_file, check_number, status, too_large, too_long
from blockpruner.engine.text.records import check_column

SLICE = 32
"""Rows to decode at a time: a dictionary can make a small file into rows of any size."""
STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes into the folder of a Dataset and of a DatasetDict."""


class _Part(BaseModel):
    filename: str


class _State(BaseModel):
    parts: list[_Part] = Field(alias="_data_files")


class _Splits(BaseModel):
    splits: list[str]


def parquet_column(path: Path, source: str, column: str) -> list[Any]:
    """Return the values of a column of a Parquet file. Other columns are not read."""
    return _read(path, source, column, "Parquet")


def arrow_column(path: Path, source: str, column: str) -> list[Any]:
    """Return the values of a column of an Arrow file, in either of its formats (stream and file)."""
    return _read(path, source, column, "Arrow")


def saved_column(folder: Path, source: str, column: str, *, train: bool) -> list[Any]:
    """Return the values of a column of a folder that `save_to_disk` wrote. Of several splits, calibration takes
    `train`, an evaluation takes `test`; a folder with one split has no choice."""
    if status(str(folder / SPLITS)) is not None:
        names = _parsed(_Splits, folder / SPLITS).splits
        wanted = "train" if train else "test"
        if not names or (wanted not in names and len(names) > 1):
            raise UserError(
                f"expected a split {wanted!r} in {source!r}, which has {', '.join(names) or 'none'}; give the folder "
                f"of one split."
            )
        name = wanted if wanted in names else names[0]
        return saved_column(_inside(folder, name), source, column, train=train)
    found: list[Any] = []
    for part in _parsed(_State, folder / STATE).parts:
        found += arrow_column(check_file(str(_inside(folder, part.filename))), source, column)
    return found


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise UserError(f"expected plain file names in {str(folder)!r}, got {name!r}.")
    return folder / name


def _parsed(model: type[Any], file: Path) -> Any:
    try:
        return model.model_validate_json(check_file(str(file)).read_bytes())
    except (ValidationError, OSError) as error:
        raise UserError(f"expected {str(file)!r} as `save_to_disk` writes it; save the data set again.") from error


def _read(path: Path, source: str, column: str, form: str) -> list[Any]:
    found: list[Any] = []
    num_bytes = 0
    try:
        with path.open("rb") as stream:
            schema, chunks = (_parquet if form == "Parquet" else _arrow)(stream, source, column)
            decode = _decoder(schema, column)
            for chunk in chunks:
                for start in range(0, len(chunk), SLICE):
                    values = _texts(chunk.slice(start, SLICE))
                    num_bytes += values.nbytes
                    if num_bytes > MAX_BYTES:
                        raise too_large(source)
                    if values.nbytes > MAX_ROW:
                        _check_rows(values, source, len(found))
                    check_number(len(found) + len(values), source)
                    found += map(decode, values.to_pylist())
    except UserError:
        raise
    except Exception as error:  # pyarrow raises errors of many types for a damaged file
        raise UserError(
            f"cannot read {source!r}: it is damaged, or no {form} file ({first_line(error)[:200]})."
        ) from error
    return found


def _parquet(stream: Any, source: str, column: str) -> tuple[pa.Schema, Iterator[pa.Array]]:
    file = pq.ParquetFile(stream)
    _place(file.schema_arrow, column, source)
    batches = file.iter_batches(batch_size=SLICE, columns=[column])
    return file.schema_arrow, (_validated(batch.column(batch.schema.get_field_index(column))) for batch in batches)


def _arrow(stream: Any, source: str, column: str) -> tuple[pa.Schema, Iterator[pa.Array]]:
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
    schema = opened(stream).schema
    options = pa.ipc.IpcReadOptions(included_fields=[_place(schema, column, source)])
    stream.seek(0)
    reader = opened(stream, options=options)
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else iter(reader)
    return schema, (_validated(batch.column(0)) for batch in batches)


def _place(schema: pa.Schema, column: str, source: str) -> int:
    check_column(dict.fromkeys(schema.names), column, source)
    if schema.names.count(column) > 1:
        raise UserError(f"expected one column {column!r} in {source!r}, got {schema.names.count(column)}.")
    place: int = schema.get_field_index(column)
    return place


def _validated(values: pa.Array) -> pa.Array:
    values.validate(full=True)  # otherwise a damaged file can end the process
    return values


def _texts(values: pa.Array) -> pa.Array:
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.cast(kind.value_type)
    return values


def _check_rows(values: pa.Array, source: str, before: int) -> None:
    for index in range(len(values)):
        if values.slice(index, 1).nbytes > MAX_ROW:
            raise too_long(source, f"row {before + index + 1}")


def _decoder(schema: pa.Schema, column: str) -> Any:
    """Return a function that undoes an encoding of `datasets`, which keeps values of mixed types as JSON."""
    if not (schema.metadata and b"huggingface" in schema.metadata):
        return lambda value: value
    try:
        feature = Features.from_arrow_schema(schema)[column]
    except (ValueError, KeyError, TypeError, AttributeError):  # features of another version of `datasets`
        return lambda value: value
    if not require_decoding(feature):
        return lambda value: value
    return lambda value: None if value is None else decode_nested_example(feature, value)
