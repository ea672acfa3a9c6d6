"""Block influence and relative magnitude of a run's model on the run's calibration text: RUN/influence.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockpruner.engine.blocks import Block
from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.model.holding import devices_of, load_decoder
from blockpruner.engine.work.memory import Placement
from blockpruner.files import write_json
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import prepare
from blockpruner.searching.run import read_summary
from blockpruner.showing.console import Reporter

FILE = "influence.json"


def write_influence(run: Path, reporter: Reporter, *, trust_remote_code: bool = False) -> None:
    """Measure, unless it was measured before. Raises UserError if the calibration windows cannot be made again."""
    if (run / FILE).exists():
        reporter.say(f"{run / FILE} is there already")
        return
    summary = read_summary(run)
    recorded = SearchConfig.from_json(summary["config"])
    # In this process, wherever the search ran, and in the search's precision.
    here = replace(recorded, dtype=summary["dtype"], device="auto", address=None, trust_remote_code=trust_remote_code)
    job = prepare(here, reporter)
    if job.windows.fingerprint != summary["calibration"]["fingerprint"]:
        raise UserError(
            f"the calibration text or the tokenizer has changed since {str(run)!r} was made; restore it, or report "
            f"without --influence."
        )
    resident = summary.get("placement", Placement.RESIDENT) == Placement.RESIDENT
    placement = Placement.RESIDENT if resident else Placement.STREAMED  # one device does; the numbers are the same
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
    """Block influence of blocks and layers; empty if it was never measured.

    fingerprint: of the calibration windows that it must have been measured on.
    """
    file = run / FILE
    if not file.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        influence = {Block.parse(name): value for name, value in found["block_influence"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(file)!r} is damaged ({error!r}); delete it and report with --influence.") from error
    if found.get("fingerprint") != fingerprint:
        raise UserError(f"{str(file)!r} is of other calibration text; delete it and report with --influence.")
    return influence


def _by_name(values: dict[Block, float]) -> dict[str, float]:
    return {str(block): value for block, value in values.items()}
