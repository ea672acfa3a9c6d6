"""The model card of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from transformers.utils.hub import cached_file

from blockpruner.engine.blocks import NUM_GROUPS, Block, Kind, Mask, amount
from blockpruner.engine.checkpoint.format import Format
from blockpruner.engine.checkpoint.provenance import ExpectedTime
from blockpruner.engine.model.from_gguf.files import read_whole
from blockpruner.engine.work.times import UNIT, TimeOf

SETTING = ("device", "dtype", "threads", "batch_size", "prompt_len")
"""What a card says of how times were measured."""
UNKNOWN_LICENCE = "not known here; see the base model's own card"


def licence_of(model: str, gguf_file: Path | None) -> str | None:
    """Return the licence stated in the model's GGUF or model card, or None if neither is available."""
    try:
        if gguf_file is not None:
            field = read_whole(gguf_file).fields.get("general.license")
            return None if field is None else str(field[0])
        card = cached_file(
            model,
            "README.md",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        values = (metadata_load(card) if card else None) or {}
        licence = values.get("license_name") or values.get("license")
        return None if licence is None else str(licence)
    except (OSError, ValueError):
        return None


def names_hub_id(model: str) -> bool:
    """Whether a model's name is an id on the hub: it looks like one, and no file or folder here has that name."""
    looks_so = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".gguf")
    return looks_so and not Path(model).exists()


def model_card(
    name: str,
    form: Format,
    provenance: dict[str, Any],
    *,
    licence: str | None,
    notes: Sequence[str],
    command: str,
    scores: tuple[str, list[str], list[list[str]]] | None = None,
) -> str:
    """Return the text of the card. provenance: content of blockpruner.json. scores: caption, header and rows of a
    table."""
    base = str(provenance["base_model"])
    dense = provenance["num_parameters_dense"]
    is_hub_id = names_hub_id(base)
    front = {
        **({"license": licence} if licence else {}),
        **({"base_model": base} if is_hub_id else {}),
        "library_name": form.loader,
        "tags": "[blockpruner, pruned]",
    }
    shown = base if is_hub_id else Path(base).name
    flag = ", trust_remote_code=True" if form.brings_code else ""
    sections = [
        "---\n" + "".join(f"{key}: {value}\n" for key, value in front.items()) + "---",
        f"# {name}",
        f"{shown} without {_amount(provenance)}, removed by "
        "BlockPruner (arXiv 2406.10594): training-free pruning of single attention and MLP blocks.",
        _table(["", ""], _facts(shown, licence, provenance, dense)),
        "## How to load it",
        *(part.format(folder=name, flag=flag) for part in form.loading),
        *(f"Note: {note}." for note in notes),
        "## What was measured",
        *_measured(provenance),
        *([scores[0], _table(*scores[1:])] if scores is not None else []),
        "## How it was made",
        f"    {command}",
        f"With blockpruner {provenance['blockpruner']}; `blockpruner.json` holds all of this for programs.",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(base: str, licence: str | None, provenance: dict[str, Any], dense: int) -> list[list[str]]:
    revision = f", revision {provenance['revision']}" if provenance.get("revision") else ""
    whole_type = provenance.get("multimodal")
    part = f"; this is the text decoder of it, a multimodal model of type {whole_type}" if whole_type else ""
    removed: dict[str, list[str]] = {}
    blocks = [Block.from_json(pair) for pair in provenance["removed"]]
    for block in sorted((one for one in blocks if one.part is None), key=lambda one: KINDS.index(one.kind)):
        removed.setdefault(_noun(block, provenance), []).append(str(block.layer))
    mask = Mask.of(blocks)
    for kind, noun in ((Kind.MHA, "KV heads"), (Kind.MLP, f"channels of MLPs (in {NUM_GROUPS}ths)")):
        lacking = {block.layer: number for block, number in mask.lacking.items() if block.kind is kind}
        if lacking:
            removed[noun] = [f"{layer} ({number})" for layer, number in sorted(lacking.items())]
    return [
        ["base model", f"{base}{revision}{part}"],
        ["licence of the base model", licence or UNKNOWN_LICENCE],
        *([f"{noun} removed in layers", ", ".join(layers)] for noun, layers in removed.items()),
        ["parameters", f"{provenance['num_parameters']:,} of {dense:,} ({provenance['ratio']:.1%} removed)"],
        ["dtype", provenance["dtype"]],
        ["calibration", _calibration(provenance)],
        *([["expected time", _expected(provenance["expected_ms"])]] if "expected_ms" in provenance else []),
    ]


KINDS = list(Kind)


def _existing(block: Block, provenance: dict[str, Any]) -> list[Block]:
    """Return the parts of a block (or layer) that the base model has."""
    return [part for part in block.parts if part.to_json() not in provenance.get("missing", [])]


def _amount(provenance: dict[str, Any]) -> str:
    removed = (Block.from_json(pair) for pair in provenance["removed"])
    return amount((part for block in removed for part in _existing(block, provenance)), "of its blocks")


def _noun(block: Block, provenance: dict[str, Any]) -> str:
    """Return what a removed block was: the mixer of its layer, an MLP, or both."""
    mixers = provenance.get("mixers")
    mixer = mixers[block.layer] if mixers else "attention"
    parts = [mixer if part.kind is Kind.MHA else "MLP" for part in _existing(block, provenance)]
    return " and ".join(part for part in parts if part)


def _calibration(provenance: dict[str, Any]) -> str:
    calibration = provenance.get("calibration")
    if calibration is None:
        return "not recorded: the blocks come from a list"
    names = _names(calibration["calibration"])
    return (
        f"{names}, {calibration['num_windows']} windows of {calibration['seq_len']} tokens (seed {calibration['seed']})"
    )


def _expected(ms: ExpectedTime) -> str:
    setting = ms.get("setting", {})
    with_what = ", ".join(f"{key.replace('_', ' ')} {setting[key]}" for key in SETTING if key in setting)
    return (
        f"{ms['pruned']:.4g} ms {UNIT[TimeOf(ms['for'])]}, {ms['dense']:.4g} for the base model: the sum of "
        f"what its blocks took{f' with {with_what}' if with_what else ''}"
    )


def _names(texts: str | list[str]) -> str:
    return " and ".join(Path(text).name for text in ([texts] if isinstance(texts, str) else texts))


def _number(value: float | None) -> str:
    """Format a value, or return an empty string if it was not measured."""
    return "" if value is None else f"{value:.3f}"


def _measured(provenance: dict[str, Any]) -> list[str]:
    rows = []
    later = [name for name, key in (("compensated", "compensation"), ("recovered", "recovery")) if key in provenance]
    columns = ["dense", "pruned", *later]
    if "pruned" in provenance:
        found = {which: provenance[which]["perplexity"] for which in ("dense", "pruned")}
        rows.append(["perplexity on the calibration text", *(_number(found.get(column)) for column in columns)])
    for key in ("compensation", "recovery"):
        for text, found in provenance.get(key, {}).get("perplexity", {}).items():
            rows.append([f"perplexity on {Path(text).name}", *(_number(found.get(column)) for column in columns)])
    lines = [_table(["", *columns], rows)] if rows else ["No perplexity is recorded."]
    if compensation := provenance.get("compensation"):
        lines.append(_compensation(compensation))
    if "recovery" in provenance:
        config = provenance["recovery"]["config"]
        lines.append(
            f"Recovered: LoRA adapters (rank {config['rank']}, {provenance['recovery']['num_rows']} rows of "
            f"{_names(config['data'])}) are merged into the weights."
        )
    return lines


def _compensation(compensation: dict[str, Any]) -> str:
    if compensation["method"] is None:
        return "Compensation was tried and changed nothing, since no fit lowered the loss on held-out windows."
    return (
        f"Compensated: the output projections of {len(compensation['changed'])} remaining blocks were fitted by least "
        f"squares ({compensation['method']}, ridge {compensation['ridge']:g}, {compensation['num_tokens']:,} tokens)."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
