"""What `blockpruner evaluate` and `blockpruner latency` wrote, as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.files import plain
from engine.errors import UserError

SPEEDS = {
    "prefill_tokens_per_s": ("prefill, tokens/s", 1),
    "decode_tokens_per_s": ("decoding, tokens/s", 1),
}
SIZES = {
    "kv_cache_bytes_per_token": ("KV cache, KiB/token", 1024),
    "peak_memory_bytes": ("peak memory, MiB", 1024**2),
    "weights_bytes": ("weights, MiB", 1024**2),
}


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    caption: str = ""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or from its last line, as `--json` prints it; NaN and infinity as None."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        found = plain(json.loads(lines[-1] if lines and lines[-1].startswith("{") else text))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"expected one JSON object in {str(path)!r}, which is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"expected one JSON object in {str(path)!r}, got a {type(found).__name__}.")
    return found


def tabulate_evaluations(paths: Sequence[Path]) -> Table:
    """One row a model or a mask: scores of tasks and their average in per cent, perplexities."""
    rows = []
    for path in paths:
        found = read_object(path)
        name = str(found.get("model") or path.stem)
        several = found.get("rows")
        rows += [(name, _groups(row)) for row in (several if isinstance(several, list) else [found])]
    # Masks, tasks, the average, perplexities: each group of columns is what any row has of it.
    columns = [
        (group, column)
        for group in range(4)
        for column in dict.fromkeys(column for _, groups in rows for column in groups[group])
    ]
    cells = [[name, *(groups[group].get(column, "") for group, column in columns)] for name, groups in rows]
    return Table(["model", *(column for _, column in columns)], cells)


def _groups(row: Any) -> list[dict[str, str]]:
    """The cells of a row by column, in four groups."""
    row = _object(row)
    removed = row.get("num_remove")
    mask = {"blocks removed": "" if removed is None else str(removed), "removed (%)": _text(row.get("ratio"), 0.01)}
    tasks = {f"{name} (%)": _text(_object(task).get("score"), 0.01) for name, task in _object(row.get("tasks")).items()}
    perplexities = {
        f"perplexity, {name}": _text(_object(found).get("value"))
        for name, found in _object(row.get("perplexity")).items()
    }
    average = {"average (%)": _text(row.get("average"), 0.01)}
    return [{key: text for key, text in mask.items() if text}, tasks, average if tasks else {}, perplexities]


def tabulate_latency(path: Path) -> Table:
    """One row a measurement, the dense and the pruned model side by side."""
    found = read_object(path)
    models = {name: _object(found[name]) for name in ("dense", "pruned") if _object(found.get(name))}
    rows = []
    generated = next((key for key in next(iter(models.values()), {}) if key.startswith("generate_")), None)
    whole = {generated: (f"{generated.split('_')[1]} tokens, seconds", 1)} if generated else {}
    for key, (name, unit) in {**SPEEDS, **whole, **SIZES}.items():
        values = [models[model].get(key) for model in models]
        ratio = (
            [] if len(values) < 2 else [f"{values[1] / values[0]:.2f}×" if _are_numbers(values) and values[0] else ""]
        )
        rows.append([name, *(_text(value, unit) for value in values), *ratio])
    header = ["", *models, *(["pruned / dense"] if len(models) == 2 else [])]
    return Table(header, rows if models else [], caption=path.stem)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _text(value: Any, unit: float = 1.0) -> str:
    """A number in a unit; nothing for what is none."""
    return f"{value / unit:,.2f}" if _are_numbers([value]) else ""
