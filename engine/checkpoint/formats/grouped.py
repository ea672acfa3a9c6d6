"""The layout of `prune`: one decoder layer per kept attention, and a short modelling file next to the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blockpruner.engine.checkpoint.format import (
    LOAD_WITH_TRANSFORMERS,
    NO_FLAG,
    ROUNDED,
    TRANSFORMERS,
    Format,
    Pruned,
    Runtime,
    compare,
)
from blockpruner.engine.errors import UserError

ALIKE_IN_VLLM = (
    "some of its attentions have fewer heads than in the dense model, and vLLM's Transformers backend takes "
    "all to have as many; use transformers"
)
NEEDS_5 = "it needs transformers 5, because transformers 4 has other names for these weights"


class Grouped(Format):
    name = "grouped"
    about = "for transformers and vLLM; every architecture"
    loading = (
        "Each decoder layer holds one kept attention. An MLP that lost its attention belongs to the previous layer.",
        "transformers runs the short modelling file in this folder:",
        LOAD_WITH_TRANSFORMERS,
        NO_FLAG,
        "vLLM uses the same file through its Transformers backend:",
        "    vllm serve {folder} --trust-remote-code --model-impl transformers",
    )
    runtimes = (TRANSFORMERS, Runtime("vLLM, Transformers backend", "vllm", "with_vllm.py", "transformers"))

    def write(self, pruned: Pruned, folder: Path) -> list[str]:
        from blockpruner.engine.checkpoint.grouped import write_grouped
        from blockpruner.engine.model.classes.modelling_text import names_differ_in_transformers_4
        from blockpruner.engine.model.loading import load_tokenizer

        write_grouped(pruned.model, load_tokenizer(pruned.source), {}, folder, pruned.source)
        compare(pruned, folder, ROUNDED, trust_remote_code=pruned.source.trust_remote_code)
        notes = [NEEDS_5] if names_differ_in_transformers_4(pruned.model) else []
        if getattr(pruned.model.config, "kept_kv_heads", None):
            notes.append(ALIKE_IN_VLLM + (", or the gguf format for llama.cpp" if _fits_gguf(pruned) else ""))
        return notes


def _fits_gguf(pruned: Pruned) -> bool:
    """Whether the gguf format takes the model: as the deci format, but attentions may have different numbers of
    heads."""
    from blockpruner.engine.checkpoint.deci import why_not_deci
    from blockpruner.engine.checkpoint.remainder import what_is_left

    try:
        return why_not_deci(replace(what_is_left(pruned.model), kv_heads={})) is None
    except UserError:  # only the grouped format can express the model
        return False
