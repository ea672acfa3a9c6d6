"""The DeciLM layout of NVIDIA's Nemotron-NAS models, which vLLM loads natively."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blockpruner.engine.checkpoint.format import (
    LOAD_WITH_TRANSFORMERS,
    NO_FLAG,
    ROUNDED,
    TRANSFORMERS,
    Format,
    Pruned,
    Runtime,
    compare,
    save,
)
from blockpruner.engine.sections import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Deci(Format):
    name = "deci"
    about = "for vLLM and other engines; Llama-like models only"
    loading = (
        "The checkpoint has the layout of NVIDIA's Nemotron-NAS models (DeciLM).",
        "transformers runs the short modelling file in this folder:",
        LOAD_WITH_TRANSFORMERS,
        NO_FLAG,
        "vLLM implements the model itself, and needs the flag only for the config class:",
        "    vllm serve {folder} --trust-remote-code",
        "SGLang, TensorRT-LLM, mlx-lm and exllamav3 also support the layout.",
    )
    runtimes = (TRANSFORMERS, Runtime("vLLM", "vllm", "with_vllm.py", "vllm"))

    def check_dense(self, config: PreTrainedConfig, source: ModelSource) -> None:
        from blockpruner.engine.checkpoint.deci import check_dense
        from blockpruner.engine.checkpoint.remainder import dense_of

        check_dense(dense_of(config)[0], self.name)

    def write(self, pruned: Pruned, folder: Path) -> list[str]:
        from blockpruner.engine.checkpoint.deci import deci_model
        from blockpruner.engine.checkpoint.remainder import what_is_left

        model, notes = deci_model(what_is_left(pruned.model))
        save(model, pruned, folder)
        compare(pruned, folder, ROUNDED)
        return notes
