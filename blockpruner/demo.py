"""`shrink` on SmolLM2-135M-Instruct, with answers of the dense, the pruned and the smaller model side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.engine.model.loading import load_model, materialize
from blockpruner.engine.model.source import SMOLLM2
from blockpruner.engine.sections import ModelSource
from blockpruner.showing.console import Reporter
from blockpruner.shrinking.config import ShrinkConfig
from blockpruner.shrinking.shrinking import shrink_model

TEXT: dict[str, Any] = {"calibration": "builtin", "num_samples": 48, "num_windows": 64, "seq_len": 128}
QUESTIONS = ("What is the capital of France?", "Why does the sea look blue?")
NEW_TOKENS = 40


def run_demo(out: Path, reporter: Reporter, *, ratio: float, replicas: int) -> dict[str, Any]:
    """Run the demo. Returns what `shrink` returns, with the answers. Creates `out` if it does not exist."""
    start = time.monotonic()
    shrunk = shrink_model(ShrinkConfig.of(model=SMOLLM2, ratio=ratio, replicas=replicas, **TEXT), out, reporter)
    reporter.say(
        "\nanswers, the written models loaded with AutoModelForCausalLM.from_pretrained(trust_remote_code=True)"
    )
    pruned, smaller = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
        for folder in (out / "pruned", out / "model")
    )
    dtype = str(smaller.dtype).removeprefix("torch.")
    models = {
        "dense": load_model(materialize(ModelSource(SMOLLM2), dtype), dtype),
        "pruned": pruned,
        "compensated": smaller,
    }
    tokenizer = AutoTokenizer.from_pretrained(out / "model", trust_remote_code=True)
    answers = {
        question: {name: _answer(model, tokenizer, question) for name, model in models.items()}
        for question in QUESTIONS
    }
    for question, by_model in answers.items():
        reporter.say(f"\n  {question}")
        for name, answer in by_model.items():
            reporter.say(f"  {name:>11}: {answer}")
    wall_s = time.monotonic() - start
    reporter.say(f"\nthe demo took {wall_s:.0f} s; the page with all figures is {out / 'report' / 'report.html'}")
    return {**shrunk, "answers": answers, "wall_s": wall_s}


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())
