"""What blockpruner.json says beside the weights of a checkpoint: which model it was made from, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import BlockPair, Count, Size
from blockpruner.engine.model.identity import Identity, identity
from blockpruner.engine.model.source import is_same_model
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.shape import ModelShape

WHOLE = "multimodal"
"""The format of a whole multimodal model whose text decoder lacks blocks."""


class Measured(TypedDict):
    perplexity: float | None


class Calibrated(TypedDict):
    calibration: str | list[str]
    num_windows: Count
    seq_len: Count
    seed: int


ExpectedTime = TypedDict(
    "ExpectedTime",
    {
        "for": Literal["decode", "prefill", "both"],
        "dense": float,
        "pruned": float,
        "setting": NotRequired[dict[str, Any]],
    },
)
"""Milliseconds, by the times of the blocks, and what those were measured with."""


class RecoveredText(TypedDict):
    dense: float | None
    pruned: float | None
    recovered: float | None


class Trained(TypedDict):
    rank: Size
    data: str | list[str]


class Recovered(TypedDict):
    config: Trained
    num_rows: Count
    perplexity: dict[str, RecoveredText]


class Compensated(TypedDict):
    method: str | None
    ridge: float | None
    num_tokens: Count
    changed: list[BlockPair]
    """Blocks whose output projections have other weights than the base model's."""
    nll: dict[str, float | None]


Exported = TypedDict("Exported", {"from": str, "fingerprint": str | None, "notes": NotRequired[list[str]]})


class Provenance(TypedDict):
    """The keys that this program reads, where they are. Each command says which of them it needs."""

    format: NotRequired[str]
    base_model: NotRequired[str]
    revision: NotRequired[str | None]
    base_fingerprint: NotRequired[str | None]
    """Identifies the weights of the base model (`engine.model.identity`). Earlier versions did not record it."""
    multimodal: NotRequired[str]
    """The type of the multimodal model of which the base model is the text decoder."""
    dtype: NotRequired[str]
    num_parameters: NotRequired[Size]
    num_parameters_dense: NotRequired[Size]
    ratio: NotRequired[Annotated[float, Field(ge=-1, le=1)]]
    removed: NotRequired[list[BlockPair]]
    mixers: NotRequired[list[str]]
    """What mixes the tokens of each layer of the base model, unless all have attention."""
    missing: NotRequired[list[BlockPair]]
    """Blocks that the base model does not have, if some of its layers have one."""
    channels: NotRequired[str]
    """Identifies the channels that the narrower MLPs have, which are in a file of their own."""
    calibration: NotRequired[Calibrated]
    dense: NotRequired[Measured | None]
    pruned: NotRequired[Measured]
    expected_ms: NotRequired[ExpectedTime]
    """If the search had a budget in time, or ranked by it."""
    compensation: NotRequired[Compensated]
    recovery: NotRequired[Recovered]
    export: NotRequired[Exported]
    blockpruner: NotRequired[str]


def compensated_blocks(provenance: Mapping[str, Any]) -> list[Block]:
    """Return the blocks whose output projections a compensation has changed."""
    return [Block.from_json(pair) for pair in provenance.get("compensation", {}).get("changed", [])]


def what_was_removed(shape: ModelShape, removed: Sequence[Block], num_parameters: int) -> dict[str, Any]:
    """Return what a checkpoint records of the blocks (or layers) that were removed, in their order. shape: of the
    dense model. num_parameters: of the pruned model."""
    missing = sorted(shape.missing, key=lambda block: block.depth)
    return {
        "num_parameters": num_parameters,
        "num_parameters_dense": shape.num_parameters,
        "ratio": shape.ratio(Mask.of(removed)),
        "removed": [block.to_json() for block in removed],
        **({"mixers": list(shape.mixers)} if shape.mixers else {}),
        **({"missing": [block.to_json() for block in missing]} if missing else {}),
    }


def base_of(base: Identity, revision: str | None) -> dict[str, Any]:
    """Return what a checkpoint records of the model that it was made from. A hub id gets the commit as its revision."""
    is_hub_id = base.kind == ""
    return {
        "base_model": base.name,
        "revision": base.fingerprint if is_hub_id else revision,
        "base_fingerprint": base.fingerprint,
    }


def check_base(provenance: Mapping[str, Any], source: ModelSource) -> None:
    """Raise UserError if `source` is not the model that a checkpoint was made from."""
    made_from, found = _made_from_and(provenance, source)
    if not made_from.is_same(found):
        raise UserError(f"expected the dense model of the checkpoint, {made_from}, got {found}; restore it.")


def check_another(provenance: Mapping[str, Any], source: ModelSource) -> str:
    """Return what to tell about a dense model that the user named: it may be the one that a checkpoint was made from in
    another dtype or quantisation. Raise UserError if it is the very folder or file, but has changed since."""
    made_from, found = _made_from_and(provenance, source)
    if made_from.is_same(found) or made_from.kind != found.kind:  # of two kinds nothing can be told
        return ""
    if is_same_model(made_from.name, found.name):
        check_base(provenance, source)
    return f"{found} is not what the checkpoint was made from, {made_from}, so its weights may differ"


def _made_from_and(provenance: Mapping[str, Any], source: ModelSource) -> tuple[Identity, Identity]:
    """Return the model that a checkpoint was made from, as recorded, and the one that `source` is."""
    return Identity(provenance["base_model"], provenance.get("base_fingerprint")), identity(source)
