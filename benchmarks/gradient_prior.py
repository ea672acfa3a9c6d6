"""Does a gradient say which blocks can go, before any removal is scored?

One forward and one backward of a window give a first-order estimate of what the removal of every block costs: the
derivative of the loss by a factor on what the block adds to its stream, from 1 to 0. A search could rank its first step
by it, and need fewer windows where the estimate explains how windows differ. Both are measured against the scores.

    python -m benchmarks.gradient_prior --calibration alpaca.jsonl --calibration wikitext2
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import blockpruner as bp
from benchmarks.common import print_json, print_table, run_benchmark
from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.scoring.forked import CallShape, ForkedPass

LOWEST = 20
"""Blocks that cost least, among which a search chooses."""
Array = NDArray[np.float64]


def main(
    calibration: Annotated[list[str], typer.Option(help="As for search.")],
    model: str = "smollm2",
    num_remove: Annotated[int, typer.Option(help="Blocks to remove before the second look.")] = 8,
    num_samples: int = 100,
    seq_len: int = 128,
    num_windows: int = 32,
    seed: int = 42,
    threads: int = 1,
    dtype: str = "float32",
) -> None:
    torch.set_num_threads(threads)
    dense, tokenizer = bp.load(model, dtype=dtype)
    text = bp.calibration(
        calibration, tokenizer, num_samples=num_samples, seq_len=seq_len, num_windows=num_windows, seed=seed
    )
    decoder = Decoder(dense)
    found = bp.search(dense, text, num_remove=num_remove, strategy="lazy", tolerance="1se")
    rows, figures = [], []
    for mask in (Mask(), found.mask):
        blocks = [block for block in decoder.shape.candidates(Granularity.MIX) if mask.keeps(block.kind, block.layer)]
        estimated = np.stack([_first_order(decoder, mask, blocks, window) for window in text.tokens], axis=1)
        scorer = ForkedPass(decoder, CallShape(sequences_per_call=32, tokens_per_head_call=256))
        sums = [
            scorer.window_sums([mask, *(mask.without(block) for block in blocks)], window[None]).cpu().numpy()[:, 0]
            for window in text.tokens
        ]
        of_masks = np.stack(sums, axis=1) / (seq_len - 1)
        figure = _compared(blocks, estimated, of_masks[1:] - of_masks[0])
        figures.append({"removed": len(mask.absent), **figure})
        rows.append([len(mask.absent), *(figure[key] for key in COLUMNS)])
    print_table(f"{model}, {num_windows} windows of {seq_len}", ["removed before", *COLUMNS.values()], rows)
    print_json({"model": model, "figures": figures})


COLUMNS = {
    "rank_correlation": "rank correlation",
    "rank_correlation_lowest": f"of the {LOWEST} that cost least",
    "best_is": "place of the best block",
    "to_contain_best_three": "places that hold the best 3",
    "variance_left": "variance over windows that is left",
}


def _compared(blocks: list[Block], estimated: Array, scored: Array) -> dict[str, Any]:
    """Compare estimates and scored increases [blocks, windows], in nats a token."""
    guess, true = estimated.mean(axis=1), scored.mean(axis=1)
    lowest = np.argsort(true)[:LOWEST]
    places = np.argsort(np.argsort(guess))
    left = []
    for index in lowest:
        fit = stats.linregress(estimated[index], scored[index])
        left.append(1 - fit.rvalue**2)
    return {
        "rank_correlation": float(stats.spearmanr(guess, true).statistic),
        "rank_correlation_lowest": float(stats.spearmanr(guess[lowest], true[lowest]).statistic),
        "best_is": int(places[lowest[0]]) + 1,
        "to_contain_best_three": int(places[lowest[:3]].max()) + 1,
        "variance_left": statistics.median(left),
        "blocks": {str(block): [float(guess[i]), float(true[i])] for i, block in enumerate(blocks)},
    }


def _first_order(decoder: Decoder, mask: Mask, blocks: list[Block], window: Tensor) -> Array:
    """Return the estimated increase in loss of each block's removal from the model without a mask, in nats a token."""
    factors = {block: torch.ones((), requires_grad=True) for block in blocks}

    def scaled(block: Block) -> Callable[..., Any]:
        factor = factors.get(block, torch.zeros(()))

        def scale(module: Any, args: Any, output: Any) -> Any:
            return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

        return scale

    with ExitStack() as stack, torch.enable_grad():
        for number, layer in enumerate(decoder.layers):
            for kind in (Kind.MHA, Kind.MLP):
                for name in decoder.architecture.modules_of(layer, kind):
                    handle = layer.get_submodule(name).register_forward_hook(scaled(Block(kind, number)))
                    stack.callback(handle.remove)
        logits = decoder.model(input_ids=window[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits.float(), window[1:])
        return -np.array([gradient.item() for gradient in torch.autograd.grad(loss, list(factors.values()))])


if __name__ == "__main__":
    run_benchmark(main)
