"""Writes a pruned checkpoint from a run or a sequence file."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.checkpoint.provenance import base_of, what_was_removed
from blockpruner.engine.checkpoint.whole import write_whole
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.identity import identity
from blockpruner.engine.model.loading import (
    check_tensors,
    dtype_to_write,
    load_tokenizer,
    load_whole,
    materialize,
    multimodal_type,
    text_of,
)
from blockpruner.engine.model.narrowing_check import check_narrowable
from blockpruner.engine.model.surgery import check_cache, kept_channels, prune
from blockpruner.engine.model.whole import check_whole, prune_whole
from blockpruner.engine.sections import ModelSource
from blockpruner.files import new_folder
from blockpruner.pruning.config import PruneConfig
from blockpruner.searching.reading import read_removals
from blockpruner.searching.sequence import order_beside, read_official_sequence
from blockpruner.showing.console import Reporter


def prune_model(config: PruneConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Remove the first `num_remove` blocks (None: all) of a run or of a file in the official format.

    Writes the pruned model to `out`, which must not exist. Returns what `prune --json` prints.
    """
    model, num_remove, dtype, revision = config.model, config.num_remove, str(config.dtype), config.revision
    removals = channels = None
    if config.run is not None:
        removals, revision = read_removals(config.run, config.source, reporter.say)
        order, channels = removals.order, removals.channels
    else:
        assert config.sequence is not None
        order = read_official_sequence(config.sequence)
        channels = order_beside(config.sequence, order)
    if not order:
        raise UserError(f"expected a run with at least one removal, got {str(config.run)!r}, which has none yet.")
    num_remove = len(order) if num_remove is None else num_remove
    if not 1 <= num_remove <= len(order):
        raise UserError(
            f"expected `num_remove` from 1 to {len(order)} (the steps in {config.run or config.sequence}), got "
            f"{num_remove}."
        )
    removed = order[:num_remove]
    if removals is not None:
        removals.warn_if_unscored(num_remove, reporter.say)
    source = ModelSource(model, revision, config.trust_remote_code)
    base = identity(source)
    source = base.at(source)
    searched = None if removals is None else removals.summary["dtype"]
    dtype, reason = dtype_to_write(dtype, source, searched)
    reporter.say(f"model {model} in {dtype} ({reason})")
    if searched not in (None, dtype):
        reporter.say(f"note: the perplexities of the run are those of the model in {searched}")
    source = materialize(source, dtype, reporter.say)
    whole_type = multimodal_type(source)
    is_whole = whole_type is not None and not config.text_only
    mask = Mask.of(removed)
    if is_whole:
        check_whole(str(whole_type), mask)
    with new_folder(out) as aside:
        whole = load_whole(source, dtype)
        dense = whole if whole_type is None else text_of(whole, source)
        for note in check_tensors(dense, source):
            reporter.say(f"note: {note}")
        decoder = Decoder(dense)
        check_removable(decoder)
        if mask.lacking:
            check_narrowable(decoder, tuple({block.kind for block in mask.lacking}))
        shape = decoder.shape
        pruned = prune(dense, mask, channels)
        check_cache(pruned)
        result = what_was_removed(shape, removed, pruned.num_parameters())
        provenance = {"format": "grouped", **base_of(base, revision), "dtype": dtype, **result}
        if whole_type is not None:
            provenance["multimodal"] = whole_type
        if removals is not None:
            of_search = removals.provenance(num_remove)
            provenance |= of_search
            result |= {key: value for key, value in of_search.items() if key == "expected_ms"}
        provenance["blockpruner"] = version("blockpruner")
        tokenizer = load_tokenizer(source)
        if is_whole:
            write_whole(prune_whole(whole, dense, pruned), pruned, tokenizer, provenance, aside, source)
        else:
            kept = kept_channels(decoder, mask, channels)
            write_grouped(pruned, tokenizer, provenance, aside, source, kept=kept)
    whose = " of the text decoder" if is_whole else ""
    reporter.say(
        f"wrote {out}: {result['num_parameters']:,} of {shape.num_parameters:,} parameters{whose} "
        f"({result['ratio']:.1%} removed, "
        f"{f'{num_remove} removals' if mask.lacking else f'{shape.num_absent(mask)} blocks'})"
    )
    return {"out": str(out), **result}
