"""`blockpruner export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, run_command
from blockpruner.cli.options import Json, TrustRemoteCode


class Format(StrEnum):
    AUTO = "auto"
    DECI = "deci"
    GROUPED = "grouped"
    VANILLA = "vanilla"
    GGUF = "gguf"


class GgufType(StrEnum):
    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


@app.command(
    epilog="Example: `blockpruner export smollm2-pruned --out smollm2-deci`, or `blockpruner export smollm2-pruned "
    "--format gguf --base smollm2 --out smollm2-gguf`"
)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that prune or recover wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the export.")],
    style: Annotated[
        Format,
        typer.Option(
            "--format",
            help="deci: for vLLM and more, Llama-like models; grouped: every architecture, for transformers and vLLM; "
            "vanilla: no custom code, less speed; gguf: llama.cpp; auto: deci where it fits, else grouped.",
        ),
    ] = Format.AUTO,
    base: Annotated[
        str | None,
        typer.Option(metavar="FILE.gguf", help="gguf: the dense model's GGUF, whose tensors are copied, or smollm2."),
    ] = None,
    gguf_type: Annotated[
        GgufType | None, typer.Option(help="gguf: convert the checkpoint's own weights to this instead.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="File of `evaluate --json` for the model card; may be given repeatedly.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a pruned checkpoint in the form that a runtime loads, with a model card."""
    from blockpruner.exporting import export_model

    run_command(
        export_model, folder, out, as_json=as_json, style=style.value, base=base,
        gguf_type=None if gguf_type is None else gguf_type.value, evaluations=evaluation or (),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
