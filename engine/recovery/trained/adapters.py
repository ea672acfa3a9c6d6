"""LoRA adapters for all linear layers, as in the paper (appendix H): rank 32, alpha 10, a learning rate of 2e-4.

Not stated there: LLM-Pruner's dropout of 0.05. The model is frozen and keeps its dtype; with bfloat16 weights, the
adapters and their optimizer state are float32 (PEFT's default).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from blockpruner.engine.recovery.what import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DROPOUT = 0.05


class Adapters(Trained):
    name = "adapters"
    about = "LoRA adapters for all linear layers except the head, which are merged at the end"
    file = "adapter"
    is_kept = True

    lr: float = Field(default=2e-4, gt=0)
    """Learning rate of the first step. It decreases linearly to zero."""
    rank: int = Field(default=32, ge=1, le=2**16)
    """Rank of the adapters."""
    alpha: float = Field(default=10, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""

    def add(self, model: PreTrainedModel, *, projections: Collection[str], seed: int) -> Any:
        """Experts whose weights are one tensor (Mixtral, Qwen3-MoE) are not linear layers and get no adapters."""
        import torch
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=DROPOUT,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        with _quiet():
            return get_peft_model(model, lora)

    def save(self, module: Any, folder: Path) -> None:
        config = module.peft_config["default"]
        # A set, which PEFT would write in an order that differs from process to process.
        config.target_modules = sorted(config.target_modules)
        module.save_pretrained(folder / self.file, save_embedding_layers=False)

    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        import torch
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        with _quiet():
            adapted = PeftModel.from_pretrained(model, folder / self.file)
        with torch.no_grad():
            for module in adapted.modules():
                if isinstance(module, LoraLayer):
                    weight = module.get_base_layer().weight
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    merged = weight.to(wide) + module.get_delta_weight("default").to(wide)
                    weight.data = merged.to(weight.dtype)  # a new tensor: the old one may be mapped from a file
        return adapted.unload()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress two irrelevant warnings: PEFT's about its (correct) handling of GPT-2's Conv1D, and transformers' about
    a deprecated name that PEFT uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
