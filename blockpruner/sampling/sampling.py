"""Writes calibration text that the model itself draws."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.full_memory import full_memory_ends
from blockpruner.engine.model.loading import (
    check_positions,
    load_config,
    load_model,
    load_tokenizer,
    materialize,
    resolve_device,
    resolve_dtype,
)
from blockpruner.engine.text.sampled import sampled_texts, start_token
from blockpruner.files import check_file, replacing
from blockpruner.sampling.config import SampleConfig
from blockpruner.showing.console import Reporter


def sample_text(config: SampleConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Write texts to the new .jsonl file `out`. Returns what `sample --json` prints."""
    began = time.monotonic()
    if out.suffix != ".jsonl":
        raise UserError(f"expected `out` to be a .jsonl file, got {str(out)!r}.")
    if out.exists():
        raise UserError(f"expected a new file, but {str(out)!r} exists; choose another `out`.")
    check_file(out)
    place = resolve_device(config.device)
    dtype, reason = resolve_dtype(config.dtype, config.source, place)
    source = materialize(config.source, dtype, reporter.say)
    check_positions(load_config(source), config.num_tokens, "`num_tokens`")
    tokenizer = load_tokenizer(source)
    start = start_token(tokenizer, config.start)
    reporter.say(f"model {config.model} in {dtype} ({reason}) on {place}, texts begin with {_shown(tokenizer, start)}")
    with full_memory_ends("for this model and batch", "use a smaller `batch_size`, or free memory."):
        model = load_model(source, dtype, place)
        with reporter.bar("writing", config.num_rows):
            texts = sampled_texts(
                model,
                tokenizer,
                start=start,
                num_rows=config.num_rows,
                num_tokens=config.num_tokens,
                batch_size=config.batch_size,
                seed=config.seed,
                on_row=reporter.advance,
            )
    with replacing(out) as aside:
        aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    reporter.say(f"wrote {out}: {len(texts)} texts of {config.num_tokens} tokens; give it as `calibration`")
    return {
        "out": str(out),
        "num_rows": len(texts),
        "num_tokens": len(texts) * config.num_tokens,
        "seconds": time.monotonic() - began,
    }


def _shown(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token))
