"""Sections of options that several commands share. A config combines sections and adds its own options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from blockpruner.engine.options import Options


@dataclass(frozen=True)
class ModelSource:
    """Which model to use, and whether its code may run."""

    name: str
    """Hub id, checkpoint folder, .gguf file, `smollm2` or `gemma3`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ChatTemplate(StrEnum):
    AUTO = "auto"
    NONE = "none"


class Bos(StrEnum):
    AUTO = "auto"
    EVERY_WINDOW = "every-window"
    FIRST_WINDOW = "first-window"
    NONE = "none"


Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Names of texts. One may be given on its own."""


class Model(Options):
    """Model"""

    model: str
    """Hugging Face id, checkpoint folder, .gguf file, smollm2, or gemma3."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""

    @property
    def source(self) -> ModelSource:
        return ModelSource(self.model, self.revision, self.trust_remote_code)


class Precision(Options):
    """Precision and device"""

    dtype: Dtype = Dtype.AUTO
    """Data type of the weights. auto: on a GPU, that of the checkpoint; on a CPU, bfloat16 if the processor has
    instructions for it, else float32."""
    device: Device = Device.AUTO
    """Device to run on. auto: CUDA if there is a GPU, else the CPU."""


class Calibration(Options):
    """Calibration text"""

    calibration: Texts = Field(default=("alpaca",), min_length=1)
    """Calibration text: alpaca, wikitext2, builtin, a .jsonl, .json, .csv, .parquet, .arrow, .txt or .raw file, or a
    folder of `save_to_disk` or of .txt files. May be repeated: each text then gives as many windows as the others."""
    text_column: str = "text"
    """Column that holds the texts, or the conversations, in a file or folder with columns."""
    chat_template: ChatTemplate = ChatTemplate.AUTO
    """What to do with a column of conversations. auto: apply the chat template of the tokenizer; none: refuse it."""
    num_samples: int = Field(default=256, ge=1)
    """Number of rows to draw from each calibration text."""
    seq_len: int = Field(default=2048, ge=2)
    """Number of tokens in one window."""
    bos: Bos = Bos.AUTO
    """Which windows begin with a BOS token. every-window: all, as one of their tokens; first-window: the first one, if
    the tokenizer adds it by itself, as in the official code; none: none. auto: every-window for Gemma, else
    first-window."""
    num_windows: int | None = Field(default=None, ge=1)
    """Use only the first N windows."""
    seed: int = 42
    """Seed for everything drawn at random: calibration rows, mutations, audited steps."""
