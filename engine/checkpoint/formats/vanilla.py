"""The stock architecture, with zeros where blocks cannot be paired."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blockpruner.engine.checkpoint.format import (
    EXACT,
    LOAD_WITH_TRANSFORMERS,
    TRANSFORMERS,
    Format,
    Pruned,
    Runtime,
    compare,
    save,
)
from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Vanilla(Format):
    name = "vanilla"
    about = "stock architecture without custom code, but less speed-up"
    loading = (
        "The model has its stock architecture. It loads wherever the base model does, without custom code:",
        LOAD_WITH_TRANSFORMERS,
        "    vllm serve {folder}",
    )
    brings_code = False
    runtimes = (TRANSFORMERS, Runtime("vLLM", "vllm", "with_vllm.py"))

    def check_dense(self, config: PreTrainedConfig, source: ModelSource) -> None:
        from blockpruner.engine.checkpoint.remainder import dense_of
        from blockpruner.engine.checkpoint.vanilla import check_pairs

        check_pairs(*dense_of(config))

    def write(self, pruned: Pruned, folder: Path) -> list[str]:
        from blockpruner.engine.checkpoint.remainder import what_is_left
        from blockpruner.engine.checkpoint.vanilla import vanilla_model

        left = what_is_left(pruned.model)
        # Pair blocks of different layers if that does not change the output.
        for sequential in (True, False):
            try:
                model, notes = vanilla_model(left, sequential=sequential)
                save(model, pruned, folder)
                compare(pruned, folder, EXACT)
                return notes
            except UserError:
                if not sequential:
                    raise
        raise AssertionError
