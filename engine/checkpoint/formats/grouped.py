"""The layout of `prune`: one decoder layer per kept attention, and a short modelling file next to the weights."""

from __future__ import annotations

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

ALIKE_IN_VLLM = (
    "its attentions have different numbers of heads, which vLLM's Transformers backend takes to be the same in all "
    "layers; use transformers, or the gguf format for llama.cpp"
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
        return [*notes, ALIKE_IN_VLLM] if getattr(pruned.model.config, "kept_kv_heads", None) else notes
