"""The complete workflow on SmolLM2-135M-Instruct: search, prune, save, load, generate, compare."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.judge.latency import generated_tokens_per_s, weights_bytes
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.loading import load_model, load_tokenizer, materialize
from blockpruner.engine.model.source import SMOLLM2
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.files import check_new_folder
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.reporting.config import ReportConfig
from blockpruner.reporting.writing import write_report
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.content import Loss
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from blockpruner.showing.tables import numbers_table

SEQ_LEN = 128
NUM_WINDOWS = 4
HELD_OUT_WINDOWS = 8
QUESTIONS = ("What is the capital of France?", "Why does the sea look blue?")
NEW_TOKENS = 40


def run_demo(out: Path, reporter: Reporter, *, ratio: float, replicas: int) -> dict[str, Any]:
    """Run the demo and return the numbers of the before/after table. Creates `out` if it does not exist."""
    start = time.monotonic()
    say = reporter.say
    run, folder = out / "run", out / "model"
    if not run.exists():
        check_new_folder(out)
    config = SearchConfig(
        model=SMOLLM2,
        calibration=("builtin",),
        num_samples=16,
        seq_len=SEQ_LEN,
        num_windows=NUM_WINDOWS,
        ratio=ratio,
        replicas=replicas,
    )
    say(
        f"1. Search: find the blocks of SmolLM2-135M-Instruct to remove, on {replicas} Ray replicas, until {ratio:.0%} "
        "of the parameters are removed"
    )
    summary = run_search(config, run, reporter)
    num_remove = len(summary["steps"])

    say("\n2. Prune: write a checkpoint without these blocks")
    if folder.exists():
        say(f"{folder} already exists")
    else:
        prune_model(PruneConfig(model=SMOLLM2, run=run), folder, reporter)

    say("\n3. Load: read the checkpoint with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")
    torch.set_num_threads(local_cpus())
    source = materialize(ModelSource(SMOLLM2), summary["dtype"])
    dense = load_model(source, summary["dtype"])
    pruned = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for question in QUESTIONS:
        say(f"\n   {question}")
        for name, model in (("dense", dense), ("pruned", pruned)):
            say(f"   {name:>6}: {_answer(model, tokenizer, question)}")

    say("\n4. Compare: perplexity on text that the search did not use, and generation with KV cache")
    table = {
        "blocks": (2 * summary["num_layers"], 2 * summary["num_layers"] - num_remove),
        "parameters": (summary["num_parameters"], sum(weight.numel() for weight in pruned.parameters())),
        "weights on disk (bytes)": (weights_bytes(source), weights_bytes(ModelSource(str(folder)))),
        "perplexity, calibration text": (_number(summary["dense"]), _number(summary["steps"][-1])),
        "perplexity, held-out text": _held_out_perplexity(dense, pruned, load_tokenizer(source)),
        "generated tokens/s": _generation_speed(dense, pruned),
    }
    _print_table(table, reporter)
    say("\n5. Report: figures, and a page with all of them")
    write_report(ReportConfig(runs=(run,)), reporter)
    wall_s = time.monotonic() - start
    say(f"the demo took {wall_s:.0f} s; the pruned model is in {folder}")
    return {
        "out": str(folder),
        "removed": [step["block"] for step in summary["steps"]],
        "table": {name: {"dense": dense, "pruned": pruned} for name, (dense, pruned) in table.items()},
        "search_s": summary["totals"]["wall_s"],
        "wall_s": wall_s,
    }


def _number(loss: Loss | None) -> float:
    return math.nan if loss is None or loss["perplexity"] is None else loss["perplexity"]


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def _held_out_perplexity(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """Measure on other rows of the built-in text: the official draw of 64 rows, of which calibration used 16."""
    windows = calibration_windows(
        Calibration(calibration=("builtin",), num_samples=64, seq_len=SEQ_LEN, seed=42), tokenizer
    ).tokens
    held_out = windows[-HELD_OUT_WINDOWS:]
    return evaluate_perplexity(dense, held_out).value, evaluate_perplexity(pruned, held_out).value


def _generation_speed(dense: PreTrainedModel, pruned: PreTrainedModel) -> tuple[float, float]:
    workload = Workload(prompt_len=16, num_tokens=NEW_TOKENS)
    speeds = generated_tokens_per_s([dense, pruned], workload, repeats=5)
    return speeds[0], speeds[1]


def _print_table(table: dict[str, tuple[float, float]], reporter: Reporter) -> None:
    grid = numbers_table("", "dense", "pruned", "change")
    for name, (dense, pruned) in table.items():
        cells = [f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for value in (dense, pruned)]
        grid.add_row(name, *cells, f"{pruned / dense - 1:+.1%}")
    reporter.console.print(grid)
