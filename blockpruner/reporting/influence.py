"""Measures block influence and relative magnitude on the model and calibration text of a run: RUN/influence.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from typing_extensions import TypedDict

from blockpruner.engine.blocks import Block
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import is_there, read_json
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.model.holding import devices_of, load_decoder
from blockpruner.engine.sections import Device
from blockpruner.engine.work.memory import Placement
from blockpruner.files import write_json
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.reading import model_of, read_summary
from blockpruner.searching.resolving import identify, prepare
from blockpruner.showing.console import Reporter

FILE = "influence.json"
BlockName = Annotated[str, AfterValidator(lambda name: str(Block.parse(name)))]


class _Influence(TypedDict):
    fingerprint: str
    """Of the calibration windows."""
    block_influence: dict[BlockName, float | None]


def write_influence(run: Path, reporter: Reporter, *, trust_remote_code: bool = False) -> None:
    """Measure the influence unless the file exists. Raises UserError if the calibration windows have changed."""
    if (run / FILE).exists():
        reporter.say(f"{run / FILE} already exists")
        return
    summary = read_summary(run)
    recorded = SearchConfig.from_json(summary["config"])
    # Measure in this process, wherever the search ran, but in the precision of the search.
    here = recorded.replace(
        dtype=summary["dtype"], device=Device.AUTO, address=None, trust_remote_code=trust_remote_code
    )
    model, began = identify(here), model_of(summary)
    if not began.is_same(model):
        raise UserError(
            f"expected the model that {str(run)!r} searched, {began}, got {model}; restore it, or report "
            f"without `influence`."
        )
    job = prepare(here, reporter, identified=model)
    if job.windows.fingerprint != summary["calibration"]["fingerprint"]:
        raise UserError(
            f"the calibration text or the tokenizer has changed since {str(run)!r} was made; restore it, or report "
            f"without `influence`."
        )
    resident = summary["placement"] == Placement.RESIDENT
    placement = (
        Placement.RESIDENT if resident else Placement.STREAMED
    )  # one device is enough and gives the same numbers
    decoder = load_decoder(job.model, job.dtype, placement, devices_of(job.device, 1))
    with reporter.bar("influence", job.windows.num_windows):
        influence = measure_influence(decoder, job.windows.tokens, lambda: reporter.advance(1))
    found = {
        "fingerprint": job.windows.fingerprint,
        "dtype": job.dtype,
        "device": job.device,
        "block_influence": _by_name(influence.block_influence),
        "relative_magnitude": _by_name(influence.relative_magnitude),
    }
    write_json(run / FILE, found)
    reporter.say(
        f"wrote {run / FILE}: block influence of every block and layer, over {job.windows.tokens.numel():,} tokens"
    )


def read_influence(run: Path, fingerprint: str) -> dict[Block, float | None]:
    """Return the block influence of blocks and layers, or an empty dict if it was never measured.

    fingerprint: fingerprint of the calibration windows. Raises UserError if the file was measured on other windows.
    """
    file = run / FILE
    if not is_there(file):
        return {}
    found = read_json(file, _Influence, "delete it and report with `influence`")
    influence = {Block.parse(name): value for name, value in found["block_influence"].items()}
    if found.get("fingerprint") != fingerprint:
        raise UserError(f"{str(file)!r} was measured on other calibration text; delete it and report with `influence`.")
    return influence


def _by_name(values: dict[Block, float]) -> dict[str, float]:
    return {str(block): value for block, value in values.items()}
