"""Read the JSON files of a model's folder, also those of its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.plain_file import check_file

LARGEST_JSON = 2**28
"""Bytes of the largest JSON file to read. The index of a model with 100,000 tensors has 10 MB."""


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Infinity and NaN are taken, since configs have them. Raises UserError."""
    check_file(file)
    if file.stat().st_size > LARGEST_JSON:
        raise UserError(f"expected {str(file)!r} to be at most {LARGEST_JSON // 2**20} MiB; it is no file of a model.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without an end
        raise UserError(
            f"expected a JSON object in {str(file)!r}, got something else ({first_line(error)}); download it again."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object in {str(file)!r}, got a {type(values).__name__}; download it again.")
    return values
