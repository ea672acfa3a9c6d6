"""Why do some blocks cost so much? Do they write outlier dimensions of the stream, or what only its first token needs?

Each of the blocks that cost most alone is removed in part: it still writes a few dimensions of the stream, those in
which it is largest or as many random ones; or it still writes at the first token only, or at all tokens but the first.
What the removal then costs, in nats a token, tells what the block was needed for.

    python -m benchmarks.outliers --model gemma3 --calibration alpaca.jsonl --calibration wikitext2_validation.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import blockpruner as bp
from benchmarks.common import print_json, print_table, run_benchmark
from benchmarks.recipe_tables import mean
from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.judge.evaluation import mean_nll
from blockpruner.engine.model.decoder import Decoder


def main(
    calibration: Annotated[list[str], typer.Option(help="As for search.")],
    model: str = "smollm2",
    blocks: Annotated[int, typer.Option(help="Number of blocks to look into, those that cost most.")] = 6,
    dimensions: Annotated[str, typer.Option(help="Numbers of dimensions that a block still writes.")] = "1,4,16",
    num_samples: int = 100,
    seq_len: int = 128,
    num_windows: int = 8,
    seed: int = 42,
    threads: int = 1,
    dtype: str = "bfloat16",
) -> None:
    torch.set_num_threads(threads)
    dense, tokenizer = bp.load(model, dtype=dtype)
    windows = bp.calibration(
        calibration, tokenizer, num_samples=num_samples, seq_len=seq_len, num_windows=num_windows, seed=seed
    ).tokens
    decoder = Decoder(dense)
    writers = _writers(decoder, windows)

    def nll(block: Block | None = None, keep: Callable[[Tensor], Tensor] | None = None) -> float:
        with _changed(writers[block], keep) if block and keep else nullcontext():
            return mean([mean_nll(dense, window) for window in windows])

    of_dense = nll()
    cost = {block: nll(block, torch.zeros_like) - of_dense for block in writers}
    largest = _largest(writers, dense, windows)
    rows = []
    for block in sorted(cost, key=lambda block: -cost[block])[:blocks]:
        size, elsewhere = largest[block]
        row: dict[str, Any] = {
            "block": str(block), "cost": cost[block], "largest": float(size.max()), "median": float(size.median()),
            "largest_elsewhere": float(elsewhere.max()), "first": nll(block, _only_first) - of_dense,
            "all_but_first": nll(block, _all_but_first) - of_dense,
        }  # fmt: skip
        for number in map(int, dimensions.split(",")):
            chosen = size.topk(number).indices
            drawn = torch.randperm(len(size), generator=torch.Generator().manual_seed(seed))[:number]
            row[f"in_{number}"] = nll(block, _only_in(chosen)) - of_dense
            row[f"in_{number}_random"] = nll(block, _only_in(drawn)) - of_dense
        rows.append(row)
    head = [COLUMNS.get(key, key.replace("in_", "still in ").replace("_", " ")) for key in rows[0]]
    print_table(f"{model}: nats above the dense model's {of_dense:.3f}", head, [list(row.values()) for row in rows])
    print_json({"model": model, "dense": of_dense, "rows": rows, "cost": {str(one): cost[one] for one in cost}})


COLUMNS = {
    "cost": "all of it gone", "largest": "largest value", "median": "median of the dimensions",
    "largest_elsewhere": "largest after the first token", "first": "still at the first token",
    "all_but_first": "gone at the first token",
}  # fmt: skip


def _only_first(output: Tensor) -> Tensor:
    return torch.cat([output[:, :1], torch.zeros_like(output[:, 1:])], dim=1)


def _all_but_first(output: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(output[:, :1]), output[:, 1:]], dim=1)


def _only_in(dimensions: Tensor) -> Callable[[Tensor], Tensor]:
    def keep(output: Tensor) -> Tensor:
        kept = torch.zeros_like(output)
        kept[..., dimensions] = output[..., dimensions]
        return kept

    return keep


@contextmanager
def _changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a module, which may return a tuple, writes to the stream."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _writers(decoder: Decoder, windows: Tensor) -> dict[Block, nn.Module]:
    """Return the module of each block whose output is added to the stream: the last of its modules and norms to run."""
    found: dict[Block, nn.Module] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(decoder.layers):
            for kind in (Kind.MHA, Kind.MLP):
                architecture = decoder.architecture
                for name in (*architecture.modules_of(layer, kind), *architecture.norms_of(layer, kind)):
                    block, module = Block(kind, number), layer.get_submodule(name)
                    hook = lambda module, args, output, block=block: found.__setitem__(block, module)  # noqa: E731
                    stack.callback(module.register_forward_hook(hook).remove)
        decoder.model(input_ids=windows[:1], use_cache=False)
    return found


def _largest(writers: dict[Block, nn.Module], model: Any, windows: Tensor) -> dict[Block, tuple[Tensor, Tensor]]:
    """Return the largest absolute value that each block writes in each dimension, and that after the first token."""
    found: dict[Block, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for block, module in writers.items():

            def look(module: nn.Module, args: Any, output: Any, block: Block = block) -> None:
                size = (output[0] if isinstance(output, tuple) else output).abs().float()
                found[block] = (size.amax(dim=(0, 1)), size[:, 1:].amax(dim=(0, 1)))

            stack.callback(module.register_forward_hook(look).remove)
        with torch.inference_mode():
            model(input_ids=windows, use_cache=False)
    return found


if __name__ == "__main__":
    run_benchmark(main)
