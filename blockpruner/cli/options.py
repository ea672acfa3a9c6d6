"""Options that several commands share, and their texts to values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from blockpruner.engine.errors import UserError


class Strategy(StrEnum):
    GREEDY = "greedy"
    LAZY = "lazy"
    ONE_SHOT = "one-shot"
    BEAM = "beam"
    EVOLUTION = "evolution"


class Per(StrEnum):
    BLOCK = "block"
    PARAMS = "params"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class PlacementChoice(StrEnum):
    AUTO = "auto"
    RESIDENT = "resident"
    STREAMED = "streamed"
    SHARDED = "sharded"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face id, checkpoint folder, .gguf file, or smollm2.")
]
Json = Annotated[bool, typer.Option("--json", help="The last line on stdout is one JSON object.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts in a .jsonl, .json or .parquet file.")]


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code run that the model brings.")]


def ray_address(address: str | None, no_ray: bool) -> str | None:
    """--no-ray is stronger than the environment, but not than --address: both together are refused."""
    return None if no_ray and address == os.environ.get("RAY_ADDRESS") else address


def parts(texts: Sequence[str] | None) -> tuple[str, ...]:
    """Of an option that takes a list with commas, and may be repeated."""
    return tuple(part for text in texts or () for part in text.replace(" ", "").split(",") if part)


def numbers(texts: Sequence[str] | None) -> tuple[int, ...]:
    if wrong := [part for part in parts(texts) if not part.isdecimal()]:
        raise UserError(f"expected --num-remove as numbers such as 0,4,8, got {wrong[0]!r}.")
    return tuple(map(int, parts(texts)))


def shares(texts: Sequence[str] | None) -> tuple[float, ...]:
    try:
        return tuple(map(float, parts(texts)))
    except ValueError:
        raise UserError(f"expected --ratio as shares such as 0.2,0.3, got {','.join(texts or ())!r}.") from None


def num_replicas(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UserError(f"expected --replicas auto or a number, got {text!r}.")
    return int(text)
