"""The complete workflow on SmolLM2-135M-Instruct: search, prune, compensate, load, generate, compare."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.cluster.nodes import local_cpus
from blockpruner.compensating.compensating import compensate_checkpoint
from blockpruner.compensating.config import CompensateConfig
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
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from blockpruner.showing.tables import numbers_table

SEQ_LEN = 128
NUM_WINDOWS = 4
HELD_OUT_WINDOWS = 8
FIT_ROWS, FIT_WINDOWS = 48, 72
QUESTIONS = ("What is the capital of France?", "Why does the sea look blue?")
NEW_TOKENS = 40


def run_demo(out: Path, reporter: Reporter, *, ratio: float, replicas: int) -> dict[str, Any]:
    """Run the demo and return the numbers of the before/after table. Creates `out` if it does not exist."""
    start = time.monotonic()
    say = reporter.say
    run, folder, better = out / "run", out / "pruned", out / "model"
    if not run.exists():
        check_new_folder(out)
    text: dict[str, Any] = {"calibration": "builtin", "num_samples": 16, "replicas": replicas}
    say(
        f"1. Search: find the blocks of SmolLM2-135M-Instruct to remove, on {replicas} Ray replicas, until {ratio:.0%} "
        "of the parameters are removed"
    )
    search = {"seq_len": SEQ_LEN, "num_windows": NUM_WINDOWS, "strategy": "lazy", "ratio": ratio}
    summary = run_search(SearchConfig.of(model=SMOLLM2, **text, **search), run, reporter)
    num_remove = len(summary["steps"])

    say("\n2. Prune: write a checkpoint without these blocks")
    if folder.exists():
        say(f"{folder} already exists")
    else:
        prune_model(PruneConfig(model=SMOLLM2, run=run), folder, reporter)

    say("\n3. Compensate: let the blocks that remain make up for those that are gone")
    if better.exists():
        say(f"{better} already exists")
    else:
        more = {"num_samples": FIT_ROWS, "num_windows": FIT_WINDOWS, "seq_len": SEQ_LEN}
        fit = {**text, **more, "method": "both", "ridge": 0.1, "dtype": summary["dtype"]}
        compensate_checkpoint(CompensateConfig.of(folder=folder, **fit), better, reporter)

    say("\n4. Load: read the checkpoint with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")
    torch.set_num_threads(local_cpus())
    source = materialize(ModelSource(SMOLLM2), summary["dtype"])
    models = {
        "dense": load_model(source, summary["dtype"]),
        "pruned": AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval(),
        "compensated": AutoModelForCausalLM.from_pretrained(better, dtype="auto", trust_remote_code=True).eval(),
    }
    tokenizer = AutoTokenizer.from_pretrained(better, trust_remote_code=True)
    for question in QUESTIONS:
        say(f"\n   {question}")
        for name, model in models.items():
            say(f"   {name:>11}: {_answer(model, tokenizer, question)}")

    say("\n5. Compare: perplexity on text that neither the search nor the fit has used, and generation with KV cache")
    blocks, parameters = 2 * summary["num_layers"], summary["num_parameters"]
    left, small = blocks - num_remove, models["pruned"].num_parameters()
    dense_bytes, small_bytes = weights_bytes(source), weights_bytes(ModelSource(str(better)))
    table = {
        "blocks": dict(zip(models, (blocks, left, left), strict=True)),
        "parameters": dict(zip(models, (parameters, small, small), strict=True)),
        "weights on disk (bytes)": dict(zip(models, (dense_bytes, small_bytes, small_bytes), strict=True)),
        "perplexity, held-out text": _held_out_perplexity(models, load_tokenizer(source)),
        "generated tokens/s": _generation_speed(models),
    }
    _print_table(table, reporter)
    say("\n6. Report: figures, and a page with all of them")
    write_report(ReportConfig(runs=(run,)), reporter)
    wall_s = time.monotonic() - start
    say(f"the demo took {wall_s:.0f} s; the compensated model is in {better}")
    return {
        "out": str(better),
        "removed": [step["block"] for step in summary["steps"]],
        "table": table,
        "search_s": summary["totals"]["wall_s"],
        "wall_s": wall_s,
    }


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def _held_out_perplexity(models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Measure on other rows of the built-in text: the last of the official draw of 64 rows, of which the search used
    the first 16 and the fit the first FIT_ROWS."""
    windows = calibration_windows(
        Calibration(calibration=("builtin",), num_samples=64, seq_len=SEQ_LEN, seed=42), tokenizer
    ).tokens
    held_out = windows[-HELD_OUT_WINDOWS:]
    return {name: evaluate_perplexity(model, held_out).value for name, model in models.items()}


def _generation_speed(models: Mapping[str, PreTrainedModel]) -> dict[str, float]:
    workload = Workload(prompt_len=16, num_tokens=NEW_TOKENS)
    speeds = generated_tokens_per_s(list(models.values()), workload, repeats=5)
    return dict(zip(models, speeds, strict=True))


def _print_table(table: Mapping[str, Mapping[str, float]], reporter: Reporter) -> None:
    grid = numbers_table("", "dense", "pruned", "compensated", "change")
    for name, values in table.items():
        cells = [f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for value in values.values()]
        grid.add_row(name, *cells, f"{values['compensated'] / values['dense'] - 1:+.1%}")
    reporter.console.print(grid)
