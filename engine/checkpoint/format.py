"""Base class of export formats. Torch and transformers are imported only where a format writes, so that names and help
are fast."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from blockpruner.engine.options import Choice
from blockpruner.engine.sections import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EXACT, ROUNDED = 1e-3, 0.1
"""Allowed difference of an export, in standard deviations of the logits. EXACT is for formats in which a wrong pairing
of blocks may make only a small difference; ROUNDED is for formats that can differ only by rounding."""
LOAD_WITH_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"{flag})
tokenizer = AutoTokenizer.from_pretrained("{folder}"{flag})
```"""
NO_FLAG = "If BlockPruner is installed, `import blockpruner.checkpoints` makes the flag unnecessary."


@dataclass(frozen=True)
class Runtime:
    """A program that loads a format."""

    name: str
    module: str
    """Module that must be importable."""
    script: str
    """File in blockpruner/serving/runtimes."""
    backend: str = "auto"
    """Model implementation to use in vLLM."""


TRANSFORMERS = Runtime("transformers", "transformers", "with_transformers.py")


@dataclass(frozen=True)
class Pruned:
    """The checkpoint to export."""

    model: PreTrainedModel
    source: ModelSource
    """Location of the checkpoint."""
    dtype: str
    """Dtype of the stored weights."""
    provenance: dict[str, Any]
    """Content of its blockpruner.json."""


class Format(Choice):
    package = "blockpruner.engine.checkpoint.formats"
    loading: ClassVar[tuple[str, ...]]
    """Paragraphs of the model card that explain how to load the model. {folder} is replaced by the folder's name, and
    {flag} by `, trust_remote_code=True` if `brings_code`."""
    brings_code: ClassVar[bool] = True
    """Whether transformers must trust code in the folder."""
    runtimes: ClassVar[tuple[Runtime, ...]]
    """Programs that load the format, for `serve-check`."""
    file: ClassVar[str | None] = None
    """File that those programs load; None means the folder."""
    loader: ClassVar[str] = "transformers"
    """`library_name` of the model card."""

    def fitting(self, pruned: Pruned) -> Format:
        """Return the format to write: this one, unless it selects one of several others."""
        return self

    def check(self, provenance: dict[str, Any]) -> None:
        """Raise UserError if the options do not fit together or do not fit the checkpoint's blockpruner.json."""

    def check_dense(self, config: PreTrainedConfig, source: ModelSource) -> None:
        """Raise UserError if no model that is pruned from this dense one can be written. What depends on the removed
        blocks is left to `write`."""

    @abstractmethod
    def write(self, pruned: Pruned, folder: Path) -> list[str]:
        """Write the model and its tokenizer into an existing, empty folder, and return notes for the user.

        If this program can load the format, the written model is compared with the pruned one. Raises UserError if the
        format cannot express the model.
        """


def save(model: PreTrainedModel, pruned: Pruned, folder: Path) -> None:
    """Write a model that transformers can save, with the tokenizer of the pruned model."""
    from blockpruner.engine.checkpoint.grouped import write_model
    from blockpruner.engine.model.loading import load_tokenizer

    model.generation_config = pruned.model.generation_config
    write_model(model, load_tokenizer(pruned.source), folder, pruned.source)


def compare(pruned: Pruned, folder: Path, limit: float, *, trust_remote_code: bool = False) -> None:
    """Load the written model. Raises UserError if its logits differ by more than `limit` standard deviations."""
    from blockpruner.engine.checkpoint.assembled import check_same
    from blockpruner.engine.model.loading import load_model

    source = ModelSource(str(folder), trust_remote_code=trust_remote_code)
    check_same(load_model(source, pruned.dtype), pruned.model, limit)
