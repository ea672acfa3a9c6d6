"""Models that bring their own code take the same path as all others, once they are trusted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.loading import load_config, load_model, meta_model
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.reference import plain_score
from blockpruner.engine.sections import ModelSource
from tests.conftest import generate, random_windows, tiny_llama
from tests.remote_code import write_remote_code_model


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    write_remote_code_model(tmp_path / "tinychuan")
    return ModelSource(str(tmp_path / "tinychuan"), trust_remote_code=True)


def test_without_trust_it_is_refused_with_the_option_that_gives_it(source: ModelSource) -> None:
    with pytest.raises(UserError, match="`trust_remote_code`"):
        load_config(ModelSource(source.name))


def test_its_masks_score_as_full_forwards_do(source: ModelSource) -> None:
    model = load_model(source, "float64")
    decoder = Decoder(model)
    check_removable(decoder)
    masks = [Mask().without(block) for block in Granularity.MIX.candidates(4)] + [Mask.parse("mha.0+mlp.1+mha.3")]
    call_shape = CallShape(sequences_per_call=4, tokens_per_head_call=32)
    sums = ForkedPass(decoder, call_shape).window_sums(masks, random_windows())
    plain = [plain_score(model, mask, random_windows()).window_sums for mask in masks]
    torch.testing.assert_close(sums, torch.tensor(plain, dtype=torch.float64), rtol=1e-12, atol=0)


def test_its_pruned_checkpoint_loads_and_generates_with_its_own_code_beside_it(
    source: ModelSource, tmp_path: Path
) -> None:
    pruned = prune(load_model(source, "float32"), Mask.parse("mha.0+mlp.1+mha.2"))
    folder = tmp_path / "pruned"
    folder.mkdir()
    write_grouped(pruned, None, {"format": "grouped"}, folder)
    assert {path.name for path in folder.glob("*.py")} == {
        "modeling_blockpruned_tinychuan.py", "modeling_tinychuan.py", "configuration_tinychuan.py",
    }  # fmt: skip
    loaded = load_model(ModelSource(str(folder), trust_remote_code=True), "float32")
    ids = random_windows()
    assert torch.equal(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)
    assert generate(loaded) == generate(pruned, use_cache=False)
    with pytest.raises(UserError, match="`trust_remote_code`"):
        load_config(ModelSource(str(folder)))


@pytest.mark.parametrize(
    ("name", "line", "changed", "message"),
    [
        (
            "scaling",
            "=past_key_values)[0]",
            "=past_key_values)[0] * 1.1",
            "called one by one",
        ),
        (
            "norming",
            "return (hidden_states,)",
            "return (self.input_layernorm(hidden_states),)",
            "changes its stream",
        ),
        ("naming", "self.mlp", "self.wide_and_deep", "under the usual names"),
        (
            "values",
            "layer(hidden_states, ",
            "layer(hidden_states, value_embedding=self.embed_tokens(input_ids), ",
            "'value_embedding', which depends on the tokens",
        ),
        (
            "sharing",
            "layer(hidden_states, ",
            "layer(hidden_states, shared=locals().setdefault('shared', {}), ",
            "leave something for each other",
        ),
        (
            "company",
            "return self.down_proj(",
            "x = x - x.mean(0, keepdim=True)\n        return self.down_proj(",
            "layer 0 with both blocks, among other rows or alone",
        ),
    ],
    ids=["work between layers", "post-norm", "strange names", "tokens", "sharing", "rows that see each other"],
)
def test_an_unknown_architecture_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, name: str, line: str, changed: str, message: str
) -> None:
    write_remote_code_model(tmp_path / name)
    source = ModelSource(str(tmp_path / name), trust_remote_code=True)
    file = Path(source.name) / "modeling_tinychuan.py"
    file.write_text(file.read_text().replace(line, changed))
    with pytest.raises(UserError, match=message) as error:
        check_removable(Decoder(meta_or_loaded(source)))
    assert "'tinychuan'" in str(error.value)


def meta_or_loaded(source: ModelSource) -> PreTrainedModel:
    """Loaded where the weights fit the changed code, else from the config alone."""
    try:
        return load_model(source, "float32")
    except UserError:
        return meta_model(source, "float32")


def test_an_unknown_architecture_with_the_usual_names_needs_no_row() -> None:
    known, unknown = tiny_llama(), tiny_llama()
    unknown.config.model_type = "mystery"
    assert Decoder(unknown).architecture == Decoder(known).architecture
    assert Decoder(unknown).shape == Decoder(known).shape
    check_removable(Decoder(unknown))


WRONG = {
    "code that ends the program": ("import sys\nsys.exit(3)\n", r"ends the program \(modeling_tinychuan.py, line 2\)"),
    "code that does not parse": ("def f(:\n", r"fails with SyntaxError \(.*line 1\)"),
    "code that fails": ("1 / 0\n", r"fails with ZeroDivisionError \(modeling_tinychuan.py, line 1\)"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("act", [load_model, meta_model])
def test_trusted_code_that_does_not_work_is_told_in_one_line(
    source: ModelSource, case: str, act: Callable[[ModelSource, str], PreTrainedModel]
) -> None:
    code, message = WRONG[case]
    for name in ("config.json", "configuration_tinychuan.py"):  # a type that no other test has registered
        path = Path(source.name) / name
        path.write_text(path.read_text().replace('"tinychuan"', '"wrongchuan"'))
    (Path(source.name) / "modeling_tinychuan.py").write_text(code)
    with pytest.raises(UserError, match=message) as error:
        act(source, "float32")
    assert "\n" not in str(error.value)
