"""Models without blocks, in memory: made, compensated, saved, with what is remembered of them for their checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.api.models import Model, as_it_was, check_no_other_parts, load, name_of
from blockpruner.api.printing import printing
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.checkpoint.provenance import base_of, what_was_removed
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.compensation.method import Method
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.identity import Identity, identity, identity_in_memory
from blockpruner.engine.model.loading import dtype_to_write
from blockpruner.engine.model.narrowing_check import check_narrowable
from blockpruner.engine.model.surgery import check_cache, kept_channels
from blockpruner.engine.model.surgery import prune as take_out
from blockpruner.engine.sections import ModelSource
from blockpruner.files import new_folder
from blockpruner.searching.reading import Removals, read_removals
from blockpruner.searching.result import SearchResult
from blockpruner.searching.sequence import order_beside, read_official_sequence
from blockpruner.showing.libraries import libraries_quiet

_provenance: WeakKeyDictionary[PreTrainedModel, dict[str, Any]] = WeakKeyDictionary()
"""What `save` writes beside the weights of models that `prune` returned."""
_kept: WeakKeyDictionary[PreTrainedModel, ChannelOrder] = WeakKeyDictionary()
"""The channels and heads that the narrower blocks of such models have."""


def prune(
    model: Model,
    found: SearchResult | Mask | Sequence[str | Block] | str | Path,
    *,
    num_remove: int | None = None,
    channels: ChannelOrder | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model without blocks. Of a model in memory it shares the weights.

    found: what `search` found; or a run directory or a removal order in the official format; or blocks, such as
    ["mha.3", "mlp.7"]. num_remove: only the first N of them. channels: which channels and heads the groups among given
    blocks are, such as ["mlp.7/4"]: `SearchResult.channels`. dtype, revision, trust_remote_code: to load a model by its
    name; auto is the dtype in which it is stored, or for a GGUF the search's. Raises UserError if removing blocks has
    no clear meaning for the model, or if it then could not generate with a KV cache.
    """
    order, recorded, removals, revision = _order(model, found, revision, trust_remote_code)
    if channels is not None and recorded is not None:
        raise UserError("expected `channels` beside blocks, got it beside a search, which has its own.")
    channels = channels or recorded
    searched = None if removals is None else removals.summary["dtype"]
    base = _identity(model, revision, trust_remote_code)
    if num_remove is not None and not 1 <= num_remove <= len(order):
        raise UserError(f"expected `num_remove` from 1 to {len(order)}, got {num_remove}.")
    order = order[:num_remove]
    if isinstance(model, PreTrainedModel):
        check_no_other_parts(model)
        dense = model
    else:
        source = base.at(ModelSource(str(model), revision, trust_remote_code))
        chosen, _ = dtype_to_write(dtype, source, searched)
        dense, _ = load(model, dtype=chosen, revision=source.revision, trust_remote_code=trust_remote_code)
    with as_it_was(dense):
        decoder = Decoder(dense)
        check_removable(decoder)
        shape, mask = decoder.shape, Mask.of(order)
        if mask.lacking:
            check_narrowable(decoder, tuple({block.kind for block in mask.lacking}))
        small = take_out(dense, mask, channels)
        check_cache(small)
        _kept[small] = kept_channels(decoder, mask, channels)
    whole_type = getattr(dense, "multimodal_type", None)
    _provenance[small] = {
        "format": "grouped",
        **base_of(base, revision),
        **({"multimodal": whole_type} if whole_type else {}),
        "dtype": str(small.dtype).removeprefix("torch."),
        **what_was_removed(shape, order, small.num_parameters()),
        **({} if removals is None else removals.provenance(len(order))),
        "blockpruner": version("blockpruner"),
    }
    return small


def compensate(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    text: Windows,
    *,
    method: str | Method = "auto",
    ridge: float | None = None,
    verbose: bool = False,
) -> PreTrainedModel:
    """A pruned model whose remaining blocks make up for the removed ones: least squares on their output projections.

    model: from `prune`; it stays as it is. dense: the model that it was made from. text: windows from `calibration`;
    every eighth is held out to choose the method and the ridge by, and if nothing lowers the loss on those, nothing is
    changed. method: auto, fold, refit or both (docs/compensation.md). ridge: None to choose one.
    """
    from blockpruner.compensating.in_memory import compensate_in_memory

    fit = Fit.of(method=method, ridge=ridge)
    with printing(verbose) as reporter, as_it_was(dense):
        made, found = compensate_in_memory(model, dense, text, fit, reporter, _kept.get(model))
    if model in _provenance:
        _kept[made] = _kept[model]
        _provenance[made] = {**_provenance[model], "compensation": found.to_json(text)}
    return made


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> Path:
    """Write a model that `prune` returned to a new folder. It loads with transformers' `from_pretrained` and
    `trust_remote_code=True`, or, after `import blockpruner.checkpoints`, without."""
    if model not in _provenance:
        raise UserError(
            f"expected a model that blockpruner.prune returned, got a {type(model).__name__}; save others with their "
            f"own save_pretrained."
        )
    with libraries_quiet(), new_folder(Path(folder)) as aside:
        write_grouped(model, tokenizer, _provenance[model], aside, kept=_kept[model])
    return Path(folder)


def _order(
    model: Model,
    found: SearchResult | Mask | Sequence[str | Block] | str | Path,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[list[Block], ChannelOrder | None, Removals | None, str | None]:
    """The blocks, the order of channels, the search that found them, and the revision.

    Raises UserError if the search had another model.
    """
    if isinstance(found, SearchResult):
        removals, where = Removals(found.summary, found.channels), "blockpruner.search"
        revision = revision or found.summary["config"]["revision"]
        removals.check_model(_identity(model, revision, trust_remote_code), where, _quiet)
        return removals.order, removals.channels, removals, revision
    if isinstance(found, Mask):
        return sorted(found.absent, key=lambda block: block.depth), None, None, revision
    if isinstance(found, str | Path):
        path = Path(found)
        if not path.is_dir():
            order = read_official_sequence(path)
            return order, order_beside(path, order), None, revision
        if isinstance(model, PreTrainedModel):
            removals = Removals.read(path)
            removals.check_model(_identity(model, None, trust_remote_code), str(path), _quiet)
        else:
            source = ModelSource(str(model), revision, trust_remote_code)
            removals, revision = read_removals(path, source, _quiet)
        return removals.order, removals.channels, removals, revision
    return [block if isinstance(block, Block) else Block.parse(block) for block in found], None, None, revision


def _identity(model: Model, revision: str | None, trust_remote_code: bool) -> Identity:
    if isinstance(model, PreTrainedModel):
        return identity_in_memory(model, name_of(model))
    return identity(ModelSource(str(model), revision, trust_remote_code))


def _quiet(text: str) -> None:
    """Say nothing, as functions do unless `verbose` is set."""
