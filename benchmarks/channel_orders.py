"""What does it cost to remove the last groups of the channels of MLPs, by how the channels are ordered?

The orders are computed on the calibration text. Each model is judged on a held-out text, as it is and
refitted: what is left of each output projection is fitted by least squares to the outputs of the dense MLP, on the same
calibration text. An order that is worse at first may leave channels that make up better for the others.

    python -m benchmarks.channel_orders --calibration alpaca.jsonl --calibration wiki.valid.parquet \\
        --held-out wiki.test.parquet --out channel_orders

H is the sum of z z^T over the tokens, z the input of an output projection W [hidden, channels] in the dense model, plus
`--damping` times the mean of its diagonal. A channel k that goes alone, while the others are refitted, costs
|W_k|^2 / [H^-1]_kk (optimal brain surgeon; see OSSCAR's local_pruner.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

import blockpruner as bp
from benchmarks.common import print_json, print_table, run_benchmark
from blockpruner.engine.blocks import NUM_GROUPS, Block, Kind, Mask, OrderedBy
from blockpruner.engine.calibration import Windows
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.compensation.least_squares import Sums, solve
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.narrowing import Narrow
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.narrowing import NarrowingReplica, channel_order
from blockpruner.engine.scoring.scorer import LocalScorer

NUM_ROUNDS = 16
"""As in OSSCAR: after each sixteenth of the channels the others are refitted, and ranked again."""
RANDOM = "random"
NUM_SEEDS = 3
WINDOWS_PER_CALL = 8


def main(
    calibration: Annotated[list[str], typer.Option(help="As for search.")],
    held_out: Annotated[str, typer.Option(help="As --perplexity of evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for the table.")],
    model: str = "smollm2",
    num_samples: int = 400,
    seq_len: int = 128,
    num_windows: int = 64,
    held_out_windows: int = 12,
    ridge: Annotated[float, typer.Option(help="Of the refit, as for compensate.")] = 0.1,
    damping: float = 0.01,
    seed: int = 42,
    threads: int = 1,
    dtype: str = "bfloat16",
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    dense, tokenizer = bp.load(model, dtype=dtype)
    text = bp.calibration(
        calibration, tokenizer, num_samples=num_samples, seq_len=seq_len, num_windows=num_windows, seed=seed
    )
    test = bp.test_text(held_out, tokenizer, seq_len=seq_len, num_windows=held_out_windows).tokens
    decoder = Decoder(dense)
    narrow = {block: one for block, one in decoder.narrow.items() if block.kind is Kind.MLP}
    start = time.monotonic()
    grams = _grams(decoder, narrow, text.tokens)
    grams_s = time.monotonic() - start
    mlps = list(narrow)
    masks = {
        "a quarter of every MLP": _without(mlps, 1),
        "half of every MLP": _without(mlps, 2),
        "half of every third MLP": _without(mlps[::3], 2),
    }
    of_dense = _nll(dense, test)
    rows = []
    for name, seconds, order in _orders(decoder, narrow, text, grams, damping):
        for what, mask in masks.items():
            pruned = prune(dense, mask, order)
            costs = {"pruned": _nll(pruned, test) - of_dense}
            _refit(pruned, decoder, mask, order, grams, ridge)
            costs["refitted"] = _nll(pruned, test) - of_dense
            rows.append({"order": name, "removed": what, "order_s": seconds, **costs})
        print_table("So far: nats more than the dense model", *_table(rows, list(masks)))
    counts = {"order_tokens": text.tokens.numel(), "held_out_tokens": test.numel()}
    print_json({"rows": rows, "dense_nll": of_dense, **counts, "grams_s": grams_s}, out / "channel_orders.json")


def _without(mlps: list[Block], number: int) -> Mask:
    groups = range(NUM_GROUPS - number + 1, NUM_GROUPS + 1)
    return Mask.of(Block(Kind.MLP, block.layer, part) for block in mlps for part in groups)


@torch.inference_mode()
def _nll(model: Any, windows: Tensor) -> float:
    """Mean token NLL in nats, several windows a call."""
    losses = []
    for some in windows.split(WINDOWS_PER_CALL):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1].float()
        losses += functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none").tolist()
    return math.fsum(losses) / len(losses)


def _refit(
    pruned: Any, decoder: Decoder, mask: Mask, order: ChannelOrder, grams: Mapping[Block, Tensor], ridge: float
) -> None:
    """Fit what is left of each output projection to the outputs of the dense MLP on its inputs in the dense model."""
    layers = pruned.get_submodule(decoder.architecture.layers)
    for block, lacks in mask.lacking.items():
        one, gram = decoder.narrow[block], grams[block]
        channels = torch.from_numpy(order.channels[block]).long()
        width = decoder.shape.width(block, lacks)
        kept, gone = channels[:width], channels[width:]
        weight = _weight(one)
        change = solve(Sums(gram[kept][:, kept], gram[kept][:, gone] @ weight[:, gone].T), ridge)
        fitted = (weight[:, kept] + change).to(pruned.dtype)
        linear = layers[block.layer].get_submodule(f"{one.name}.{one.linears.outward}")
        linear.weight = nn.Parameter(fitted, requires_grad=False)  # the old one may be the dense model's


def _orders(
    decoder: Decoder, narrow: Mapping[Block, Narrow], text: Windows, grams: Mapping[Block, Tensor], damping: float
) -> Iterator[tuple[str, float, ChannelOrder]]:
    """Yield name, seconds (without those of the Grams) and order. Random orders have the same name."""
    replica = LocalScorer(NarrowingReplica(decoder, text.tokens, (Kind.MLP,), PPL))

    def of_search(by: OrderedBy) -> ChannelOrder:
        return channel_order(replica, text.num_windows, 1.0, (Kind.MLP,), by)

    def by(importance: Callable[[Block, Narrow], Tensor]) -> ChannelOrder:
        return ChannelOrder.by({block: importance(block, one).detach().numpy() for block, one in narrow.items()})

    regular = partial(_regular, grams, damping)
    made: dict[str, Callable[[], ChannelOrder]] = {
        "norm of the activations x norm of the column of down (used)": lambda: of_search(OrderedBy.OUTPUT),
        "norm of the activations": lambda: by(lambda block, one: grams[block].diagonal().sqrt()),
        "H^-1, all at once": lambda: by(lambda block, one: _saliency(_weight(one), regular(block))),
        f"H^-1, in {NUM_ROUNDS} rounds": lambda: by(lambda block, one: _in_rounds(_weight(one), regular(block))),
        "L1 norm of the rows of gate and up (MultiPruner)": lambda: of_search(OrderedBy.WEIGHTS),
        "L1 norm of the rows of gate and up, and of the columns of down": lambda: by(
            lambda block, one: one.row_norms + _weight(one).abs().sum(0)
        ),
    }
    for name, make in made.items():
        start = time.monotonic()
        order = make()
        yield name, time.monotonic() - start, order
    for number in range(NUM_SEEDS):
        draw = np.random.default_rng(number)
        yield RANDOM, 0.0, ChannelOrder.by({block: draw.random(one.num_channels) for block, one in narrow.items()})


@torch.inference_mode()
def _grams(decoder: Decoder, narrow: Mapping[Block, Narrow], windows: Tensor) -> dict[Block, Tensor]:
    """Return the sums of z z^T of each MLP, float64 [channels, channels]."""
    found = {
        block: torch.zeros(one.num_channels, one.num_channels, dtype=torch.float64) for block, one in narrow.items()
    }

    def look(block: Block, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2).float()
        found[block] += (inputs.T @ inputs).double()

    handles = [one.outward.register_forward_pre_hook(partial(look, block)) for block, one in narrow.items()]
    for some in windows.split(WINDOWS_PER_CALL):
        decoder.model(input_ids=some, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _regular(grams: Mapping[Block, Tensor], damping: float, block: Block) -> Tensor:
    diagonal = grams[block].diagonal()
    return grams[block] + damping * diagonal.mean() * torch.eye(len(diagonal), dtype=torch.float64)


def _weight(narrow: Narrow) -> Tensor:
    weight: Any = narrow.outward.weight
    return weight.detach().double()


def _saliency(weight: Tensor, gram: Tensor) -> Tensor:
    """What each channel costs that goes alone. weight: [hidden, channels]. gram: [channels, channels]."""
    return weight.square().sum(0) / torch.cholesky_inverse(torch.linalg.cholesky(gram)).diagonal()


def _in_rounds(weight: Tensor, gram: Tensor) -> Tensor:
    """Return numbers that rank the channels: those that go in the first round have the lowest."""
    kept, product = torch.arange(len(gram)), weight @ gram
    rank = torch.empty(len(gram), dtype=torch.float64)
    number = math.ceil(len(gram) / NUM_ROUNDS)
    while len(kept):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[kept][:, kept]))
        saliency = (product[:, kept] @ inverse).square().sum(0) / inverse.diagonal()
        going = saliency.argsort()
        rank[kept[going]] = torch.arange(len(gram) - len(kept), len(gram), dtype=torch.float64)
        kept = kept[going[number:]].sort().values
    return rank


def _table(rows: list[dict[str, Any]], masks: list[str]) -> tuple[list[str], list[list[Any]]]:
    kinds = ("pruned", "refitted")
    body = []
    for name in dict.fromkeys(row["order"] for row in rows):
        mine = [row for row in rows if row["order"] == name]
        cells = []
        for what in masks:
            for kind in kinds:
                values = [row[kind] for row in mine if row["removed"] == what]
                cells.append(math.fsum(values) / len(values))
        body.append([name, *cells, f"{mine[0]['order_s']:.0f}"])
    head = [f"{what}{', refitted' if kind == 'refitted' else ''}" for what in masks for kind in kinds]
    return ["order", *head, "s"], body


if __name__ == "__main__":
    run_benchmark(main)
