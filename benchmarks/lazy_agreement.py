"""Does lazy search remove the same blocks as greedy search, and with how much less work?

Recorded cases are run directories of `blockpruner search --strategy greedy`, whose ledgers hold the sums of every
candidate. Lazy search reads them, so a case takes seconds; where its order differs from the recorded one, the model
scores what is missing. Random cases are tiny models of many types, on which both searches run.

    blockpruner search smollm2 --calibration builtin --seq-len 32 --num-windows 64 --num-remove 16 --out runs/builtin42
    python -m benchmarks.lazy_agreement runs/* --held-out wiki.test.raw --tiny 20
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import console, print_json, print_table, run_benchmark, spread_out
from benchmarks.memory import Memory
from blockpruner.engine.blocks import Block, Granularity, Mask
from blockpruner.engine.calibration import calibration_windows, evaluation_windows
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_model, load_tokenizer, materialize
from blockpruner.engine.score import perplexity
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.search.audit import most_misses
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.oracle import Found
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.engine.strategies.greedy import Greedy
from blockpruner.engine.strategies.lazy import Lazy
from blockpruner.searching.ledger import parse_ledger

NEAR_TIE = 0.002
"""Nats: a first difference that costs less is called a near-tie, else a miss."""
TINY_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "gpt_neox", "stablelm", "opt")
HELD_OUT_WINDOWS, HELD_OUT_TOKENS = 32, 256


@dataclass
class Case:
    name: str
    greedy: list[Block]
    lazy: list[Block]
    regret: float
    """Loss of the lazy search's choice above that of greedy's, at the first step in which they differ, in nats."""
    work_ratio: float
    """Naive work / work."""
    greedy_work_ratio: float
    held_out: tuple[float, float] | None = None
    """Perplexity of greedy's mask and of the other one."""

    @property
    def num_right(self) -> int:
        pairs = zip(self.greedy, self.lazy, strict=True)
        return next((n for n, (one, other) in enumerate(pairs) if one != other), len(self.greedy))

    @property
    def num_judged(self) -> int:
        """Return the number of steps up to the first difference; after it the searches are in different states."""
        return min(len(self.greedy), self.num_right + 1)

    @property
    def same_set(self) -> bool:
        return set(self.greedy) == set(self.lazy)


def compare(name: str, space: SearchSpace, memory: Memory, greedy: Found | None, strategy: Lazy) -> Case:
    memory.forget_work()
    if greedy is None:
        greedy = Greedy().run(space, memory)
    greedy_ratio = memory.naive_flops / memory.work_flops if memory.work_flops else math.nan
    memory.forget_work()
    lazy = strategy.run(space, memory)
    case = Case(name, list(greedy.blocks), list(lazy.blocks), 0.0, memory.naive_flops / memory.work_flops, greedy_ratio)
    if case.num_right < len(case.greedy):
        base = Mask.of(case.greedy[: case.num_right])
        values = memory.score([base.without(order[case.num_right]) for order in (case.greedy, case.lazy)])
        case.regret = values[1].value - values[0].value
    return case


class Recorded:
    """A model and the runs recorded with it."""

    def __init__(self, run: Path) -> None:
        header = parse_ledger(run / "ledger.jsonl")[0][0]
        config, self.dtype = header["config"], header["dtype"]
        self.made_of = config["model"], self.dtype
        self.source = materialize(ModelSource(config["model"]), self.dtype)
        self.tokenizer = load_tokenizer(self.source)
        self.decoder = Decoder(load_model(self.source, self.dtype))
        kernel = header["kernel"]
        shape = CallShape(sequences_per_call=kernel["rows"], tokens_per_head_call=kernel["head_tokens"])
        self.forked = ForkedPass(self.decoder, shape)

    def case(self, run: Path, strategy: Lazy) -> Case:
        lines = parse_ledger(run / "ledger.jsonl")[0]
        config = lines[0]["config"]
        text = Calibration(**{name: config[name] for name in Calibration.model_fields})
        windows = calibration_windows(text, self.tokenizer)
        if (config["model"], lines[0]["dtype"]) != self.made_of:
            raise typer.BadParameter(f"expected runs of one model in one dtype; {run} is another")
        if windows.fingerprint != lines[0]["calibration"]["fingerprint"]:
            raise typer.BadParameter(f"the calibration text of {run} has changed")
        memory = Memory(self.forked, self.decoder.shape, windows.tokens)
        memory.learn(run / "ledger.jsonl")
        blocks = [Block.from_json(line["block"]) for line in lines if line["type"] == "step"]
        space = SearchSpace(
            shape=self.decoder.shape, blocks=Granularity(config["blocks"]), budget=Budget(num_remove=len(blocks))
        )
        greedy = Greedy().run(space, memory)
        assert list(greedy.blocks) == blocks
        work_ratio = memory.naive_flops / memory.work_flops
        case = compare(run.name, space, memory, greedy, strategy)
        case.greedy_work_ratio = work_ratio
        return case

    def held_out(self, case: Case, tokens: torch.Tensor) -> tuple[float, float]:
        memory = Memory(self.forked, self.decoder.shape, tokens)
        masks = [Mask.of(order) for order in (case.greedy, case.lazy)]
        first, second = memory.score(masks)
        return perplexity(first.value), perplexity(second.value)


def tiny_case(index: int) -> Case:
    """Return a random model of 8 layers and random tokens."""
    torch.manual_seed(index)
    kind = TINY_TYPES[index % len(TINY_TYPES)]
    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "ffn_dim": 128, "initializer_range": 0.1,
        "word_embed_proj_dim": 64, "pad_token_id": 0, "max_position_embeddings": 128,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float64).eval()
    decoder = Decoder(model)
    forked = ForkedPass(decoder, CallShape(sequences_per_call=64, tokens_per_head_call=4096))
    space = SearchSpace(shape=decoder.shape, blocks=Granularity.MIX, budget=Budget(num_remove=6))
    memory = Memory(forked, decoder.shape, torch.randint(1, 128, (32, 32)))
    return compare(f"tiny {kind} {index}", space, memory, None, Lazy())


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories of greedy searches.")] = None,
    tiny: Annotated[int, typer.Option(help="Number of random tiny models.")] = 0,
    held_out: Annotated[str | None, typer.Option(help="Text to evaluate the masks of --tolerance 1se on.")] = None,
    tuned: Annotated[str, typer.Option(help="Names of runs used for tuning; reported separately.")] = "",
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    cases: list[Case] = []
    tolerant: list[Case] = []
    recorded: Recorded | None = None
    for run in runs or []:
        recorded = recorded or Recorded(run)
        cases.append(recorded.case(run, Lazy()))
        console.print(f"{run.name}: {cases[-1].num_right} of {len(cases[-1].greedy)}", highlight=False)
        if held_out is not None:
            windows = evaluation_windows(held_out, recorded.tokenizer, seq_len=HELD_OUT_TOKENS).tokens
            tokens = spread_out(windows, HELD_OUT_WINDOWS)
            case = recorded.case(run, Lazy(tolerance="1se"))
            case.held_out = recorded.held_out(case, tokens)
            tolerant.append(case)
    cases += [tiny_case(index) for index in range(tiny)]
    rows = []
    for case in cases:
        verdict = "same order" if case.num_right == len(case.greedy) else (
            f"{'near-tie' if case.regret < NEAR_TIE else 'miss'} at step {case.num_right + 1}, {case.regret:.5f}"
        )  # fmt: skip
        rows.append([case.name, f"{case.num_right}/{len(case.greedy)}", verdict, "same" if case.same_set else "other",
                     case.greedy_work_ratio, case.work_ratio])  # fmt: skip
    print_table(
        "Lazy search against greedy",
        ["case", "steps right", "order", "final set", "naive / greedy's work", "naive / lazy's work"],
        rows,
    )
    names = set(tuned.split(","))
    figures: dict[str, Any] = {}
    for group, some in {
        "tuned on": [case for case in cases if case.name in names],
        "reported": [case for case in cases if case.name not in names and not case.name.startswith("tiny")],
        "tiny": [case for case in cases if case.name.startswith("tiny")],
    }.items():
        if some:
            misses = sum(case.num_right < len(case.greedy) for case in some)
            steps = sum(case.num_judged for case in some)
            figures[group] = {
                "num_cases": len(some), "num_same_order": len(some) - misses, "num_steps": steps,
                "num_misses": misses, "most_step_misses": most_misses(misses, steps),
                "median_work_ratio": statistics.median(case.work_ratio for case in some),
                "cases": {case.name: [case.num_right, len(case.greedy), case.regret, case.work_ratio] for case in some},
            }  # fmt: skip
            console.print(
                f"{group}: {len(some) - misses} of {len(some)} cases in the same order; {misses} of {steps} steps "
                f"differ (at most {most_misses(misses, steps):.1%} do, at 95 % confidence); "
                f"median work 1/{figures[group]['median_work_ratio']:.1f} of the naive",
                highlight=False,
            )
    if tolerant:
        changes = [case.held_out[1] / case.held_out[0] - 1 for case in tolerant if case.held_out]
        print_table(
            "--tolerance 1se",
            ["case", "blocks shared", "naive / work", "held-out: greedy", "1se", "change (%)"],
            [
                [case.name, f"{len(set(case.greedy) & set(case.lazy))}/{len(case.greedy)}", case.work_ratio,
                 *case.held_out, 100 * change]
                for case, change in zip(tolerant, changes, strict=True) if case.held_out
            ],
        )  # fmt: skip
        figures["1se"] = {
            "median_work_ratio": statistics.median(case.work_ratio for case in tolerant),
            "mean_change": statistics.mean(changes),
            "cases": {case.name: [case.work_ratio, *(case.held_out or ())] for case in tolerant},
        }
        console.print(
            f"1se: median work 1/{figures['1se']['median_work_ratio']:.1f} of the naive, held-out perplexity "
            f"{statistics.mean(changes):+.2%} against greedy's on average"
        )
    print_json(figures)


if __name__ == "__main__":
    run_benchmark(main)
