"""Perplexity of a model or a pruned checkpoint on named or local texts."""

from __future__ import annotations

from typing import Any

from cluster.progress import Reporter
from engine.calibration import evaluation_windows
from engine.errors import UserError
from engine.evaluation import evaluate_perplexity
from engine.loading import (
    ModelSource,
    check_positions,
    load_config,
    load_model,
    load_tokenizer,
    materialize,
    resolve_device,
    resolve_dtype,
)


def evaluate_model(
    model: str,
    reporter: Reporter,
    *,
    texts: list[str],
    text_column: str = "text",
    seq_len: int = 2048,
    num_windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Returns what `evaluate --json` prints."""
    if not texts:
        raise UserError("nothing to evaluate: give --perplexity wikitext2 or --perplexity FILE.")
    place = resolve_device(device)
    source = ModelSource(model, revision, trust_remote_code)
    dtype, reason = resolve_dtype(dtype, source, place)
    source = materialize(source, dtype, reporter.say)
    check_positions(load_config(source), seq_len)
    tokenizer = load_tokenizer(source)
    sets = {text: evaluation_windows(text, tokenizer, seq_len=seq_len, text_column=text_column) for text in texts}
    reporter.say(f"model {model} in {dtype} ({reason}) on {place}")
    loaded = load_model(source, dtype, place)
    results = {}
    for text, windows in sets.items():
        tokens = windows.tokens[:num_windows]
        with reporter.bar(f"perplexity {text}", len(tokens)):
            found = evaluate_perplexity(loaded, tokens, lambda: reporter.advance(1))
        spread = "" if found.stderr is None else f" ± {found.stderr:.4f}"
        reporter.say(f"perplexity on {text}: {found.value:.4f}{spread} ({found.num_windows} windows of {seq_len})")
        results[text] = {"value": found.value, "stderr": found.stderr, "num_windows": found.num_windows}
    return {"tasks": {}, "average": None, "perplexity": results}
