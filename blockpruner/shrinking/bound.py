"""As much as goes within a bound on the perplexity: bisection over the removal order, each model compensated and judged
on windows that neither the search nor the fit has seen."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import read_json
from blockpruner.files import write_json
from blockpruner.pruning.pruning import prune_model
from blockpruner.searching.reading import Removals

if TYPE_CHECKING:
    from blockpruner.shrinking.shrinking import Way

KNOWN = dict[str, float | None]
"""None for a perplexity that is not finite, which JSON does not have."""


def prune_within_bound(way: Way, increase: float) -> None:
    """Write the pruned and the compensated model with the most removals whose perplexity is at most 1 + increase times
    the dense model's. Raises UserError if there is none.

    Assumes that the perplexity grows with the number of removals. Models that were judged are not judged again when the
    same call goes on.
    """
    tries = way.out / "tries"
    tries.mkdir(exist_ok=True)
    judged = tries / "perplexity.json"
    recorded = read_json(judged, KNOWN, "delete it") if judged.exists() else {}
    known = {name: math.nan if value is None else value for name, value in recorded.items()}

    def value(name: str, model: Path | None) -> float:
        if name not in known:
            source = way.source if model is None else way.written(model)
            known[name] = way.judged("dense" if model is None else f"without {name}", source)
            write_json(judged, known)
        return known[name]

    def fits(number: int) -> bool:
        pruned, model = tries / f"{number}-pruned", tries / f"{number}-model"
        if str(number) not in known:
            if not pruned.exists():
                prune_model(way.prune_config(number), pruned, way.reporter)
            if not model.exists():
                way.compensate(pruned, model)
        found = value(str(number), model)
        way.reporter.say(f"{number} removals: perplexity {found:.2f}, {found / dense - 1:+.1%} of the dense model's")
        return found <= (1 + increase) * dense

    dense = value("dense", None)
    low, high = 0, len(Removals.read(way.run).order) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        raise UserError(
            f"expected at least one removal that raises the perplexity by at most {increase:.0%}; the first one raises "
            f"it by {known['1'] / dense - 1:.0%}. Allow more, or give other `blocks`."
        )
    for kind, out in (("model", way.model), ("pruned", way.pruned)):  # the last one says that this part is done
        if not out.exists():
            (tries / f"{low}-{kind}").rename(out)
    shutil.rmtree(tries)
