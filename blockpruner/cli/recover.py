"""`blockpruner recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, errors_in_one_line, run_command
from blockpruner.cli.options import Device, Dtype, Json, TextColumn, TrustRemoteCode


@app.command(epilog="Example: `blockpruner recover smollm2-pruned --perplexity wikitext2 --out smollm2-recovered`")
def recover(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that prune wrote.")],
    out: Annotated[
        Path, typer.Option(help="New folder for the recovered checkpoint. The same command resumes what was stopped.")
    ],
    data: Annotated[
        str, typer.Option(help="Rows to train on: alpaca, wikitext2, builtin or a file, as for search.")
    ] = "alpaca",
    text_column: TextColumn = "text",
    num_rows: Annotated[int, typer.Option(help="Rows drawn from the data; the others are held out.")] = 8000,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Text on which to say what was recovered: rest (the rows held out), wikitext2 (its test split), "
            "builtin or a file; may be given repeatedly."
        ),
    ] = None,
    num_windows: Annotated[int | None, typer.Option(min=1, help="Use only its first so many windows.")] = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 32,
    alpha: Annotated[float, typer.Option(help="The adapters are scaled by alpha / rank.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate at first; it falls linearly to zero.")] = 2e-4,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Forwards of one step of the optimizer.")] = 4,
    seq_len: Annotated[
        int, typer.Option(help="Tokens of a row, more are cut off; and of a window of --perplexity.")
    ] = 512,
    seed: Annotated[int, typer.Option(help="Of the draw, the order of the rows, the adapters and the dropout.")] = 42,
    dtype: Annotated[Dtype, typer.Option(help="Of the frozen weights, as for search; adapters are float32.")] = (
        Dtype.AUTO
    ),
    device: Annotated[Device, typer.Option(help="As for search.")] = Device.AUTO,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of this machine, each with a copy of the model.")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train LoRA adapters for a pruned checkpoint, and merge them."""
    from blockpruner.engine.recovery import RecoveryConfig
    from blockpruner.recovering import recover_model

    with errors_in_one_line():
        config = RecoveryConfig(
            rank=rank, alpha=alpha, lr=lr, epochs=epochs, batch_size=batch_size, accumulation=accumulation,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
    run_command(
        recover_model, folder, out, as_json=as_json, resumable=True, config=config, data=data, text_column=text_column,
        num_rows=num_rows, texts=perplexity or [], num_windows=num_windows, dtype=dtype.value, device=device.value,
        gpus=gpus, trust_remote_code=trust_remote_code,
    )  # fmt: skip
