"""The whole story on SmolLM2-135M-Instruct: search, prune, save, load, generate, compare."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.judge.latency import Workload, generated_tokens_per_s, weights_bytes
from blockpruner.engine.model.loading import SMOLLM2, ModelSource, load_model, load_tokenizer, materialize
from blockpruner.files import check_new_folder
from blockpruner.pruning import prune_model
from blockpruner.reporting.writing import write_report
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter

SEQ_LEN = 128
NUM_WINDOWS = 4
HELD_OUT_WINDOWS = 8
QUESTIONS = ("What is the capital of France?", "Why does the sea look blue?")
NEW_TOKENS = 40


def run_demo(out: Path, reporter: Reporter, *, ratio: float, replicas: int) -> dict[str, Any]:
    """Returns the figures of the before/after table. `out` is made if the search has not begun there."""
    start = time.monotonic()
    say = reporter.say
    run, folder = out / "run", out / "model"
    if not run.exists():
        check_new_folder(out)
    config = SearchConfig(
        model=SMOLLM2,
        calibration="builtin",
        num_samples=16,
        seq_len=SEQ_LEN,
        num_windows=NUM_WINDOWS,
        ratio=ratio,
        replicas=replicas,
    )
    say(
        f"1. Search: which blocks of SmolLM2-135M-Instruct can go? On {replicas} Ray replicas, until {ratio:.0%} "
        "of the parameters are gone"
    )
    summary = run_search(config, run, reporter)
    num_remove = len(summary["steps"])

    say("\n2. Prune: a checkpoint without these blocks")
    if folder.exists():
        say(f"{folder} is there already")
    else:
        prune_model(SMOLLM2, folder, reporter, run=run)

    say(
        "\n3. Load it again, as any program would: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    )
    torch.set_num_threads(local_cpus())
    source = materialize(ModelSource(SMOLLM2), summary["dtype"])
    dense = load_model(source, summary["dtype"])
    pruned = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for question in QUESTIONS:
        say(f"\n   {question}")
        for name, model in (("dense", dense), ("pruned", pruned)):
            say(f"   {name:>6}: {_answer(model, tokenizer, question)}")

    say("\n4. Compare: perplexity on text that the search did not see, generation with KV cache")
    table = {
        "blocks": (2 * summary["num_layers"], 2 * summary["num_layers"] - num_remove),
        "parameters": (summary["num_parameters"], sum(weight.numel() for weight in pruned.parameters())),
        "weights on disk (bytes)": (weights_bytes(source), weights_bytes(ModelSource(str(folder)))),
        "perplexity, calibration text": (summary["dense"]["perplexity"], summary["steps"][-1]["perplexity"]),
        "perplexity, held-out text": _held_out_perplexity(dense, pruned, load_tokenizer(source)),
        "generated tokens/s": _generation_speed(dense, pruned),
    }
    _print_table(table, reporter)
    say("\n5. Look: pictures, and a page with all of them")
    write_report([run], None, reporter)
    wall_s = time.monotonic() - start
    say(f"the demo took {wall_s:.0f} s; the pruned model is in {folder}")
    return {
        "out": str(folder),
        "removed": [step["block"] for step in summary["steps"]],
        "table": {name: {"dense": dense, "pruned": pruned} for name, (dense, pruned) in table.items()},
        "search_s": summary["totals"]["wall_s"],
        "wall_s": wall_s,
    }


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def _held_out_perplexity(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """On other rows of the built-in text: the official draw of 64 rows, of which the first 16 calibrated."""
    windows = calibration_windows("builtin", tokenizer, num_samples=64, seq_len=SEQ_LEN, seed=42).tokens
    held_out = windows[-HELD_OUT_WINDOWS:]
    return evaluate_perplexity(dense, held_out).value, evaluate_perplexity(pruned, held_out).value


def _generation_speed(dense: PreTrainedModel, pruned: PreTrainedModel) -> tuple[float, float]:
    workload = Workload(prompt_len=16, num_tokens=NEW_TOKENS)
    speeds = generated_tokens_per_s([dense, pruned], workload, repeats=5)
    return speeds[0], speeds[1]


def _print_table(table: dict[str, tuple[float, float]], reporter: Reporter) -> None:
    grid = Table("", "dense", "pruned", "change")
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, (dense, pruned) in table.items():
        cells = [f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for value in (dense, pruned)]
        grid.add_row(name, *cells, f"{pruned / dense - 1:+.1%}")
    reporter.console.print(grid)
