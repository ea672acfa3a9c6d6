"""Tables from the output of `blockpruner evaluate` and `blockpruner latency`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import parse_json, read_bytes

SPEEDS = {
    "prefill_tokens_per_s": ("prefill, tokens/s", 1),
    "decode_tokens_per_s": ("decoding, tokens/s", 1),
}
SIZES = {
    "kv_cache_bytes_per_token": ("KV cache, KiB/token", 1024),
    "peak_memory_bytes": ("peak memory, MiB", 1024**2),
    "weights_bytes": ("weights, MiB", 1024**2),
}

PHRASES = {
    "device": "{}",
    "dtype": "{}",
    "threads": "{} CPU threads",
    "threads_per_replica": "{} CPU threads per replica",
    "batch_size": "batch size {}",
    "limit": "only the first {} questions of each task",
    "seq_len": "perplexity over windows of {} tokens",
    "num_windows": "only the first {} windows",
    "repeats": "{} repeats",
    "prompt_len": "prompts of {} tokens",
    "num_tokens": "{} new tokens",
    "static_cache": "static KV cache",
    "versions": "{}",
}
"""Caption text for each setting."""


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    caption: str = ""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, or from its last line as printed by `--json`. NaN and infinity become None."""
    text = read_bytes(path)
    lines = text.splitlines()
    try:
        found = parse_json(lines[-1] if lines and lines[-1].startswith(b"{") else text, nan_is_null=True)
    except ValueError as error:
        raise UserError(f"expected one JSON object in {str(path)!r}, which is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"expected one JSON object in {str(path)!r}, got a {type(found).__name__}.")
    return found


def tabulate_evaluations(paths: Sequence[Path]) -> Table:
    """Return one row per model or mask: task scores and their average in percent, and perplexities, with errors."""
    rows = []
    settings: dict[str, list[str]] = {}
    for path in paths:
        found = read_object(path)
        name = str(found.get("model") or path.stem)
        of_setting = settings.setdefault(_setting(found), [])
        of_setting += [name] if name not in of_setting else []
        several = found.get("rows")
        several = [_object(row) for row in several] if isinstance(several, list) else [found]
        has_groups = any("/" in str(row.get("mask")) for row in several)  # as in mlp.7/4
        rows += [(name, _groups(row, "removals" if has_groups else "blocks removed")) for row in several]
    # The groups are masks, tasks, the average and perplexities. A group has every column that any row has.
    columns = [
        (group, column)
        for group in range(4)
        for column in dict.fromkeys(column for _, groups in rows for column in groups[group])
    ]
    cells = [[name, *(groups[group].get(column, "") for group, column in columns)] for name, groups in rows]
    captions = ["value ± standard error", *(f"{', '.join(names)}: {text}" for text, names in settings.items())]
    return Table(["model", *(column for _, column in columns)], cells, "; ".join(captions))


def _groups(row: dict[str, Any], removals: str) -> list[dict[str, str]]:
    """Return the cells of a row by column, in four groups. removals: title of their number."""
    removed = row.get("num_remove")
    mask = {removals: "" if removed is None else str(removed), "removed (%)": _text(row.get("ratio"), 0.01)}
    tasks = {
        f"{name} (%)": _with_error(_object(task), "score", 0.01) for name, task in _object(row.get("tasks")).items()
    }
    perplexities = {
        f"perplexity, {name}": _with_error(_object(found), "value")
        for name, found in _object(row.get("perplexity")).items()
    }
    average = {"average (%)": _text(row.get("average"), 0.01)}
    return [{key: text for key, text in mask.items() if text}, tasks, average if tasks else {}, perplexities]


def tabulate_latency(path: Path) -> Table:
    """Return a table of an output file of `latency`."""
    found = read_object(path)
    table = tabulate_speeds(found)
    return replace(table, caption=f"{path.stem}: {table.caption}; {_setting(found)}")


def tabulate_speeds(found: dict[str, Any]) -> Table:
    """Return one row per measurement, with the dense and the pruned model side by side and their measured ratio."""
    columns = {name: _object(found[name]) for name in ("dense", "pruned", "ratio") if _object(found.get(name))}
    rows = []
    generated = next((key for key in next(iter(columns.values()), {}) if key.startswith("generate_")), None)
    whole = {generated: (f"{generated.split('_')[1]} tokens, seconds", 1)} if generated else {}
    for key, (name, unit) in {**SPEEDS, **whole, **SIZES}.items():
        cells = [_with_quartiles(of_one, key, 1 if of == "ratio" else unit) for of, of_one in columns.items()]
        rows.append([name, *cells])
    header = ["", *("pruned / dense" if of == "ratio" else of for of in columns)]
    return Table(header, rows if columns else [], "median (quartiles)")


def _setting(found: dict[str, Any]) -> str:
    """Describe the settings that the numbers of a file depend on."""
    setting = _object(found.get("setting"))
    known = {name: setting[name] for name in PHRASES if setting.get(name) not in (None, False)}
    return ", ".join(PHRASES[name].format(_listed(value)) for name, value in known.items()) or "setting not recorded"


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _with_error(values: dict[str, Any], name: str, unit: float = 1.0) -> str:
    text, error = _text(values.get(name), unit), _text(values.get("stderr"), unit)
    return f"{text} ± {error}" if text and error else text


def _with_quartiles(values: dict[str, Any], name: str, unit: float) -> str:
    text, quartiles = _text(values.get(name), unit), _object(values.get("spread")).get(name)
    return f"{text} ({'–'.join(_text(value, unit) for value in quartiles)})" if isinstance(quartiles, list) else text


def _text(value: Any, unit: float = 1.0) -> str:
    """Format a number in a unit. Returns an empty string for anything else."""
    if not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        return ""
    return f"{value / unit:,.{2 if abs(value / unit) < 1000 else 0}f}"
