"""Prunes and compensates in one go, on the calibration text of the search."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from blockpruner.compensating.compensating import compensate_checkpoint
from blockpruner.compensating.config import CompensateConfig
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import multimodal_type
from blockpruner.engine.sections import Calibration
from blockpruner.files import check_new_folder
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.searching.reading import read_summary
from blockpruner.showing.console import Reporter


def prune_and_compensate(config: PruneConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Write the compensated checkpoint of a run to `out`. Returns what `prune --compensate --json` prints."""
    if config.run is None:
        raise UserError(
            "expected `run` with `compensate`, whose calibration text is used, got a removal order; prune first, and "
            "then use `blockpruner compensate`."
        )
    if not config.text_only and (whole_type := multimodal_type(config.source)) is not None:
        raise UserError(
            f"expected `text_only` with `compensate`, since {config.model!r} is a multimodal model of type "
            f"{whole_type!r}, and only its text decoder alone can be compensated."
        )
    check_new_folder(out)
    searched = read_summary(config.run)["config"]
    text = {name: searched[name] for name in Calibration.model_fields if name in searched}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = Path(aside) / "pruned"
        pruned = prune_model(config, folder, reporter)
        compensate = CompensateConfig.of(folder=folder, trust_remote_code=config.trust_remote_code, **text)
        compensated = compensate_checkpoint(compensate, out, reporter)
    return {**pruned, **compensated}
