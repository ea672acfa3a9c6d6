"""Checks that an export runs in its runtimes and gives the same output as the pruned model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.calibration import read_rows
from blockpruner.engine.checkpoint.format import Format, Runtime
from blockpruner.engine.checkpoint.grouped import SIDE_CAR, read_provenance
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.agreement import NUM_TOP, agreement
from blockpruner.engine.model.identity import fingerprint
from blockpruner.engine.model.loading import load_model, load_tokenizer
from blockpruner.engine.sections import Dtype, ModelSource
from blockpruner.serving.config import ServeCheckConfig
from blockpruner.showing.console import Reporter

PROMPT_LENGTHS = (48, 17, 32)


def check_serving(config: ServeCheckConfig, reporter: Reporter) -> dict[str, Any]:
    """Generate from the export in `folder` in each runtime, and compare with the checkpoint that it was made from.

    Returns what `serve-check --json` prints.
    """
    folder, num_tokens = config.folder, config.num_tokens
    dtype = "float32" if config.dtype is Dtype.AUTO else str(config.dtype)
    provenance = _provenance(folder)
    source = _pruned_source(folder, provenance, config.pruned, config.trust_remote_code)
    interpreters = [sys.executable, *(str(path.absolute()) for path in config.python)]
    if wrong := [path for path in interpreters if not (Path(path).is_file() and os.access(path, os.X_OK))]:
        raise UserError(f"expected a Python interpreter for `python`, got {wrong[0]!r}, which is not executable.")
    threads = config.threads or local_cpus()
    tokenizer = load_tokenizer(source)
    rows = read_rows("builtin", "text", train=True)
    prompts = [tokenizer(row)["input_ids"][:length] for row, length in zip(rows, PROMPT_LENGTHS, strict=False)]
    model = load_model(source, dtype)
    form = Format.all()[provenance["format"]]
    path = folder / form.file if form.file else folder
    results = []
    runtimes = form.runtimes
    with reporter.bar("checking", total=len(runtimes)):
        for runtime in runtimes:
            request = {
                "model": str(path.resolve()), "prompts": prompts, "num_tokens": num_tokens, "num_top": NUM_TOP,
                "repeats": 0, "dtype": dtype, "threads": threads, "backend": runtime.backend,
            }  # fmt: skip
            result: dict[str, Any] = {"runtime": runtime.name, "version": None, "result": "not installed"}
            python = next((path for path in interpreters if has_module(path, runtime.module)), None)
            if python is not None:
                try:
                    answer = run_runtime(python, runtime, request)
                    found = agreement(model, prompts, answer["tokens"], answer["top"])
                    result |= {"version": answer["version"], "result": found.verdict, **asdict(found)}
                except RuntimeFailed as error:
                    result |= {"result": "failed", "error": str(error)}
            results.append(result)
            reporter.advance(1)
    _print_table(results, form.name, reporter)
    return {"folder": str(folder), "format": form.name, "dtype": dtype, "results": results}


class RuntimeFailed(RuntimeError):
    """A runtime failed to generate. The message is the last line of its output."""


@cache
def has_module(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def run_runtime(python: str, runtime: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    """What the runtime's script answers (blockpruner/serving/runtimes). Raises RuntimeFailed."""
    script = Path(__file__).parent / "runtimes" / runtime.script
    done = subprocess.run([python, str(script)], input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeFailed(lines[-1] if lines else f"ended with code {done.returncode}")
    # Runtimes also write to stdout, some of them until the very end.
    answer: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return answer


def _provenance(folder: Path) -> dict[str, Any]:
    if not (folder / SIDE_CAR).is_file():
        raise UserError(f"expected a folder written by `blockpruner export`, got {str(folder)!r} without {SIDE_CAR}.")
    provenance = read_provenance(str(folder))
    known = [name for name, form in Format.all().items() if form.runtimes]
    if provenance.get("format") not in known:
        raise UserError(
            f"expected one of the formats {', '.join(known)} in the {SIDE_CAR} of {str(folder)!r}, got "
            f"{provenance.get('format')!r}."
        )
    return provenance


def _pruned_source(
    folder: Path, provenance: dict[str, Any], pruned: Path | None, trust_remote_code: bool
) -> ModelSource:
    """Return the checkpoint to compare with. A pruned folder is compared with itself, loaded by this program."""
    export = provenance.get("export")
    if export is None:
        return ModelSource(str(folder), trust_remote_code=trust_remote_code)
    path = pruned or Path(export["from"])
    if not path.is_dir():
        raise UserError(
            f"expected the pruned checkpoint in {str(path)!r}, which does not exist; set its path with `pruned`."
        )
    source = ModelSource(str(path), trust_remote_code=trust_remote_code)
    if fingerprint(source, export["fingerprint"]) != export["fingerprint"]:
        raise UserError(f"expected the checkpoint that {str(folder)!r} was exported from, got {str(path)!r}.")
    return source


def _print_table(results: list[dict[str, Any]], style: str, reporter: Reporter) -> None:
    grid = Table("runtime", "version", "result", "same tokens", "log-probabilities differ by", title=f"format {style}")
    for result in results:
        counted = "num_tokens" in result
        grid.add_row(
            result["runtime"],
            result["version"] or "–",
            result["result"] + (f": {result['error']}" if "error" in result else ""),
            f"{result['num_same']} of {result['num_tokens']}" if counted else "–",
            f"{result['mean_difference']:.1e} (at most {result['largest_difference']:.1e})" if counted else "–",
        )
    reporter.console.print(grid)
