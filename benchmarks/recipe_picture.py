"""The picture of what `recipes` measured: perplexity by the share of the parameters that is gone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blockpruner.showing.style import RUN_COLORS, logarithmic, save

MARKERS = "osD^vP*Xh"
LOST = 100.0
"""Models with more than this many times the perplexity of the dense one are off the picture."""


def picture(dense: Mapping[str, float], figures: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw a panel for each text: refitted models with the range of the draws, and those as pruned, pale.

    dense: perplexity of each text. figures: what `recipe_tables.report` prints; only models for a share are drawn.
    """
    at_ratio = [figure for figure in figures if figure["at"].endswith("%")]
    # Sorted, so that pictures of the same recipes have the same colours.
    recipes = sorted({figure["recipe"] for figure in at_ratio})
    if not recipes:
        return
    whole = Figure(figsize=(4.8 * len(dense) + 1.4, 4.2), layout="constrained")
    for panel, (text, of_dense) in zip(whole.subplots(1, len(dense), squeeze=False)[0], dense.items(), strict=True):
        for index, recipe in enumerate(recipes):
            mine = [figure for figure in at_ratio if figure["recipe"] == recipe]
            look = {"color": RUN_COLORS[index % len(RUN_COLORS)], "marker": MARKERS[index % len(MARKERS)]}
            for what in ("pruned", "refitted"):
                found = sorted((statistics.mean(one["ratios"]), *one[text][what]) for one in mine if one[text][what])
                if not found:
                    continue
                shares, middles, lowest, highest = zip(*found, strict=True)
                is_best = what == "refitted" or not any(one[text]["refitted"] for one in mine)
                panel.errorbar(
                    [100 * share for share in shares],
                    middles,
                    yerr=[
                        [middle - low for middle, low in zip(middles, lowest, strict=True)],
                        [high - middle for middle, high in zip(middles, highest, strict=True)],
                    ],
                    alpha=1.0 if is_best else 0.3,
                    linestyle="-" if is_best else "--",
                    label=recipe if is_best else None,
                    capsize=3,
                    **look,
                )
        panel.axhline(of_dense, color="black", linewidth=1, linestyle=":", label="dense")
        panel.set(xlabel="parameters removed (%)", ylabel="perplexity", title=text)
        logarithmic(panel)
        panel.set_ylim(top=min(panel.get_ylim()[1], LOST * of_dense))
        panel.grid(alpha=0.3)
    whole.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    told = f"refitted (solid) and as pruned (pale); bars: range of the draws; up to {LOST:g} times the dense perplexity"
    whole.suptitle(told, fontsize=10)
    save(whole, out)
