"""GGUF: what llama.cpp computes from the file is what the pruned model computes."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.formats.gguf import Gguf
from blockpruner.engine.checkpoint.gguf import from_checkpoint, read_base, write_gguf
from blockpruner.engine.checkpoint.remainder import what_is_left
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.agreement import agreement
from blockpruner.engine.model.surgery import prune
from blockpruner.serving.serve_check import run_runtime
from tests.conftest import TINY, random_windows, tiny_llama, tiny_tokenizer
from tests.engine.architectures import ROWS

SIZES = {"hidden_size": 64, "intermediate_size": 96}  # rows of whole blocks, so that they can be quantised
MASKS = ["mha.0", "mlp.1", "mha.0+mlp.0", "mha.0+mha.1+mlp.2", "mlp.3+mha.2", "mlp.0+mlp.1+mlp.2+mlp.3"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def tiny_qwen2(**overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**TINY, **SIZES, "initializer_range": 0.2, **overrides}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    return model.eval()


def dense(kind: str, **overrides: Any) -> PreTrainedModel:
    return tiny_qwen2(**overrides) if kind == "qwen2" else tiny_llama(torch.float32, **SIZES, **overrides)


def write_base(model: PreTrainedModel, file: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """A GGUF of a dense model as llama.cpp's converter makes it: queries and keys in neighbouring pairs for llama."""
    config = model.config
    name = config.model_type
    left = what_is_left(prune(model, Mask()))
    content = from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32")
    writer = gguf.GGUFWriter(file, name)
    for key, (value, kind_of_value, item) in content.fields.items():
        if key != "general.architecture":
            writer.add_key_value(key.replace("llama.", f"{name}."), value, kind_of_value, item)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    for key, raw in content.tensors.items():
        data = raw.values
        if name == "qwen2" and (".attn_q." in key or ".attn_k." in key):
            heads = config.num_attention_heads if ".attn_q." in key else config.num_key_value_heads
            data = data.reshape(heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)  # halves again
        if data.ndim == 2:
            writer.add_tensor(key, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def check(pruned: PreTrainedModel, file: Path, tolerance: float = 0.005) -> None:
    """llama.cpp gives the model's own log-probabilities. tolerance: of their mean difference, in nats. llama.cpp's KV
    cache is float16, so a token may differ where two are as likely."""
    (llama_cpp,) = Gguf.runtimes
    prompts = random_windows(num_windows=2, seq_len=12).tolist()
    request = {
        "model": str(file), "prompts": prompts, "num_tokens": 16, "num_top": 20, "repeats": 0, "threads": 1,
    }  # fmt: skip
    answer = run_runtime(sys.executable, llama_cpp, request)
    found = agreement(pruned, prompts, answer["tokens"], answer["top"])
    assert found.verdict != "differs"
    assert found.mean_difference < tolerance


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_checkpoints_own_weights_give_its_logits(tmp_path: Path, kind: str, text: str) -> None:
    pruned = prune(dense(kind), Mask.parse(text))
    left = what_is_left(pruned)
    write_gguf(from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32"), left, tmp_path / "model.gguf")
    check(pruned, tmp_path / "model.gguf")


VARIANTS = [{"rope_parameters": LLAMA3}, {"tie_word_embeddings": True}, {"head_dim": 32}, {"attention_bias": True}]


@pytest.mark.parametrize("options", VARIANTS)
def test_variants_of_llama_are_expressed(tmp_path: Path, options: dict[str, Any]) -> None:
    pruned = prune(dense("llama", **options), Mask.parse("mha.0+mlp.1+mha.2"))
    left = what_is_left(pruned)
    write_gguf(from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32"), left, tmp_path / "model.gguf")
    check(pruned, tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tensors_of_the_base_are_copied_as_they_are(tmp_path: Path, kind: str) -> None:
    model = dense(kind)
    pruned = prune(model, Mask.parse("mha.0+mlp.1+mha.2"))
    left = what_is_left(pruned)
    base = write_base(model, tmp_path / "base.gguf", gguf.GGMLQuantizationType.Q8_0)
    notes = write_gguf(read_base(base, left), left, tmp_path / "model.gguf")
    assert "one head of zeros" in notes[0]
    check(pruned, tmp_path / "model.gguf", tolerance=0.1)
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    after = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for new, old in (("blk.1.attn_v", "blk.1.attn_v"), ("blk.1.ffn_down", "blk.2.ffn_down")):
        assert (after[f"{new}.weight"].data == before[f"{old}.weight"].data).all()
        assert after[f"{new}.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


def test_metadata_and_tokenizer_of_the_base_are_kept(tmp_path: Path) -> None:
    model = dense("llama")
    left = what_is_left(prune(model, Mask.parse("mha.0")))
    base = write_base(model, tmp_path / "base.gguf", gguf.GGMLQuantizationType.F16)
    write_gguf(from_checkpoint(left, None, "q8_0", read_base(base, left)), left, tmp_path / "model.gguf")
    before, after = (gguf.GGUFReader(file).fields for file in (base, tmp_path / "model.gguf"))
    for name, field in before.items():
        if name.startswith("tokenizer."):
            assert after[name].contents() == field.contents()
    assert after["deci.attention.head_count"].contents() == [1, 4, 4, 4]
    assert after["deci.feed_forward_length"].contents() == [96] * 4
    assert after["general.file_type"].contents() == 7


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "deeper": ({"num_hidden_layers": 5}, "num_hidden_layers 5 where 4 is needed"),
    "wider": ({"intermediate_size": 128}, "intermediate_size 128 where 96 is needed"),
    "with another epsilon": ({"rms_norm_eps": 1e-3}, "with rms_norm_eps 0.001"),
    "with another RoPE": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "with rope_parameters"),
    "with other weights": ({"seed": 1}, r"tensor blk\..* differs from the checkpoint's"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_base_of_another_model_is_refused(tmp_path: Path, case: str) -> None:
    left = what_is_left(prune(dense("llama"), Mask.parse("mha.0")))
    options, message = OTHERS[case]
    other = tiny_llama(torch.float32, **{**SIZES, **options})
    base = write_base(other, tmp_path / "base.gguf", gguf.GGMLQuantizationType.F16)
    with pytest.raises(UserError, match=message):
        read_base(base, left)


def test_a_base_of_another_architecture_or_no_gguf_is_refused(tmp_path: Path) -> None:
    left = what_is_left(prune(dense("llama"), Mask.parse("mha.0")))
    base = write_base(dense("qwen2"), tmp_path / "base.gguf", gguf.GGMLQuantizationType.F16)
    with pytest.raises(UserError, match="architecture 'qwen2' where 'llama' is needed"):
        read_base(base, left)
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(UserError, match="as GGUF"):
        read_base(tmp_path / "text.gguf", left)


def test_what_the_format_cannot_express_is_refused() -> None:
    left = what_is_left(prune(ROWS["qwen3"].model(), Mask.parse("mha.0")))
    with pytest.raises(UserError, match="not for 'qwen3'; use `format=grouped`"):
        from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    left = what_is_left(prune(dense("llama", rope_parameters=yarn), Mask.parse("mha.0")))
    with pytest.raises(UserError, match="RoPE of type 'yarn'"):
        from_checkpoint(left, tiny_tokenizer(adds_space=False), "f32")


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer(adds_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    left = what_is_left(prune(dense("llama"), Mask.parse("mha.0")))
    with pytest.raises(UserError, match="give the dense model's GGUF with `base`"):
        from_checkpoint(left, tokenizer, "f32")


def test_a_tokenizer_like_that_of_llama_2_is_to_be_taken_from_the_gguf_of_the_dense_model() -> None:
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    backend: Any = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    backend.pre_tokenizer = None
    left = what_is_left(prune(dense("llama"), Mask.parse("mha.0")))
    with pytest.raises(UserError, match="give the dense model's GGUF with `base`"):
        from_checkpoint(left, tokenizer, "f32")


def test_a_tokenizer_that_changes_text_first_is_refused() -> None:
    from tokenizers import normalizers, pre_tokenizers

    left = what_is_left(prune(dense("llama"), Mask.parse("mha.0")))
    adds_space, lowers = tiny_tokenizer(adds_space=False), tiny_tokenizer(adds_space=False)
    adds_space.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lowers.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer in (adds_space, lowers):
        with pytest.raises(UserError, match="changes no text before it splits it"):
            from_checkpoint(left, tokenizer, "f32")
    unicode = tiny_tokenizer(adds_space=False)
    unicode.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen2's, which llama.cpp's own converter leaves out
    from_checkpoint(left, unicode, "f32")


def test_bos_and_eos_are_added_where_the_tokenizer_adds_them() -> None:
    from tokenizers import processors

    left = what_is_left(prune(dense("llama"), Mask.parse("mha.0")))
    for template in ("$A", "<s> $A", "$A </s>"):
        tokenizer = tiny_tokenizer(adds_space=False)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        fields = from_checkpoint(left, tokenizer, "f32").fields
        added = [fields[f"tokenizer.ggml.add_{name}_token"][0] for name in ("bos", "eos")]
        assert added == ["<s>" in template, "</s>" in template]
