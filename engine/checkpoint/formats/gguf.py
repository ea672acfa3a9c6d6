"""A GGUF file for llama.cpp."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from blockpruner.engine.checkpoint.format import Format, Pruned, Runtime
from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GgufType(StrEnum):
    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


class Gguf(Format):
    name = "gguf"
    about = "for llama.cpp"
    loading = (
        "llama.cpp and programs built on it load the file; its architecture is `deci`. Turn on flash attention: "
        "without it, the V cache is padded to the widest layer.",
        "    llama-server -m {folder}/model.gguf -fa on",
    )
    runtimes = (Runtime("llama.cpp", "xllamacpp", "with_llama_cpp.py"),)
    file = "model.gguf"
    loader = "gguf"

    base: str | None = Field(default=None, examples=["FILE.gguf"])
    """GGUF of the dense model to copy tensors from, smollm2, or gemma3."""
    gguf_type: GgufType | None = None
    """Convert the checkpoint's own weights to this type instead of copying tensors."""

    def check(self, provenance: dict[str, Any]) -> None:
        if self.base is None and self.gguf_type is None:
            raise UserError(
                "expected `base`, a GGUF of the dense model whose tensors are copied, or `gguf_type` f32, f16 or q8_0, "
                "to convert the checkpoint's own weights; got neither."
            )
        if "recovery" in provenance and self.gguf_type is None:
            raise UserError(
                "expected `gguf_type` f32, f16 or q8_0 for a recovered checkpoint, got only `base`: the GGUF of the "
                "dense model does not have the weights that recover trained."
            )

    def check_dense(self, config: PreTrainedConfig, source: ModelSource) -> None:
        from blockpruner.engine.checkpoint.deci import check_dense
        from blockpruner.engine.checkpoint.gguf_metadata import metadata, rope_factors
        from blockpruner.engine.checkpoint.remainder import dense_of
        from blockpruner.engine.model.loading import load_tokenizer

        dense, _ = dense_of(config)
        check_dense(dense, self.name)
        if self.gguf_type is not None:
            rope_factors(dense)
        if self.base is None:
            metadata(dense, load_tokenizer(source))

    def write(self, pruned: Pruned, folder: Path) -> list[str]:
        from blockpruner.engine.checkpoint.gguf import from_checkpoint, read_base, write_gguf
        from blockpruner.engine.checkpoint.provenance import check_another, compensated_blocks
        from blockpruner.engine.checkpoint.remainder import what_is_left
        from blockpruner.engine.model.from_gguf.files import gguf_file
        from blockpruner.engine.model.loading import load_tokenizer

        left = what_is_left(pruned.model)
        if (left.widths or left.kv_heads) and self.gguf_type is None:
            raise UserError(
                "expected `gguf_type` f32, f16 or q8_0 for a checkpoint with narrower blocks, got only `base`: the "
                "tensors of the dense model's GGUF have all channels and heads."
            )
        content, notes = None, []
        if self.base is not None:
            file = gguf_file(self.base)
            if file is None:
                raise UserError(f"expected a .gguf file for `base`, got {self.base!r}.")
            if self.gguf_type is None and (told := check_another(pruned.provenance, ModelSource(self.base))):
                notes = [f"the tensors are those of another file: {told}"]
            changed = compensated_blocks(pruned.provenance)
            content = read_base(file, left, changed)
            if changed and self.gguf_type is None:
                notes.append(
                    f"{len(changed)} output projections, which the compensation changed, are those of the checkpoint; "
                    f"where the file's are quantised, they are stored as Q8_0"
                )
        if self.gguf_type is not None:
            tokenizer = None if content is not None else load_tokenizer(pruned.source)
            content = from_checkpoint(left, tokenizer, self.gguf_type, content)
        assert content is not None
        return notes + write_gguf(content, left, folder / str(self.file))
