"""The table of what `recipes` measured, over draws, and paired over windows; and its picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.common import print_json, print_table
from benchmarks.recipe_picture import picture


def report(out: Path, against: str = "") -> None:
    """Print a table and draw it: geometric means over the draws, the lowest and the highest, and the difference from
    the recipe `against` (the first one, if it is empty), paired over draws and windows."""
    files = [file for file in sorted(out.glob("*.json")) if file.stem.isdigit()]
    draws = {file.stem: json.loads(file.read_text())["rows"] for file in files}
    rows = {(row["recipe"], row["at"], seed): row for seed, found in draws.items() for row in found}
    recipes = list(dict.fromkeys(recipe for recipe, _, _ in rows if recipe != "dense"))
    recipes.sort(key=lambda recipe: recipe != against)
    places = list(dict.fromkeys(at for recipe, at, _ in rows if recipe != "dense"))
    texts = list(next(iter(rows.values()))["nll"])
    table, figures = [], []
    for at in places:
        reference: dict[str, dict[str, list[float]]] = {}
        for recipe in recipes:
            of_draws = {seed: row for seed in draws if (row := rows.get((recipe, at, seed)))}
            if not of_draws:
                continue
            ratios = [row["ratio"] for row in of_draws.values()]
            figure: dict[str, Any] = {"at": at, "recipe": recipe, "draws": len(of_draws), "ratios": ratios}
            figure["speeds"] = [row["speed"] for row in of_draws.values() if "speed" in row]
            cells = [at, recipe, f"{min(ratios):.1%} to {max(ratios):.1%}"]
            cells.append(f"{statistics.mean(figure['speeds']):.2f}" if figure["speeds"] else "")
            for text in texts:
                judged = {seed: row.get("refitted", row["nll"])[text] for seed, row in of_draws.items()}
                reference.setdefault(text, judged)
                figure[text] = {
                    "pruned": _over_draws([row["nll"][text] for row in of_draws.values()]),
                    "refitted": _over_draws([row["refitted"][text] for row in of_draws.values() if "refitted" in row]),
                    "difference": _paired(reference[text], judged),
                }
                cells += [_shown(figure[text]["pruned"]), _shown(figure[text]["refitted"])]
                low, middle, high = figure[text]["difference"]
                cells.append("" if judged is reference[text] else f"{middle:+.2f} ({low:+.2f} to {high:+.2f})")
            table.append(cells)
            figures.append(figure)
    of_texts = [f"{text}: {what}" for text in texts for what in ("pruned", "refitted", "nats")]
    print_table("Recipes", ["at", "recipe", "ratio", "speed", *of_texts], table)
    of_dense = next(row for row in rows.values() if row["recipe"] == "dense")["nll"]
    dense = {text: math.exp(mean(values)) for text, values in of_dense.items()}
    picture(dense, figures, out / "recipes.png")
    print_json({"dense": dense, "figures": figures}, out / "recipes.json")


def _over_draws(nlls: Sequence[Sequence[float]]) -> list[float]:
    """Return the geometric mean, the lowest and the highest of the draws' perplexities; nothing without draws."""
    means = [mean(values) for values in nlls]
    return [math.exp(value) for value in (mean(means), min(means), max(means))] if means else []


def _shown(values: Sequence[float]) -> str:
    return f"{values[0]:.1f} ({values[1]:.1f} to {values[2]:.1f})" if values else ""


def _paired(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> tuple[float, float, float]:
    """Return the mean difference in nats over the draws that both have, with a 95 % interval over windows."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds or ours is theirs:
        return 0.0, 0.0, 0.0
    differences = np.mean([np.subtract(theirs[seed], ours[seed]) for seed in seeds], axis=0)
    half = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
    mean = float(differences.mean())
    return mean - half, mean, mean + half


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
