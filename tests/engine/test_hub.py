"""Models and texts from a hub: a small server in place of the real one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import close_session, constants

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.identity import identity
from blockpruner.engine.model.loading import dtype_to_write, load_model, load_tokenizer, materialize, meta_model
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.text.rows import rows_of
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from blockpruner.shrinking.config import ShrinkConfig
from blockpruner.shrinking.shrinking import shrink_model
from tests import calls
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.hub_server import TOKEN, Hub
from tests.hub_server import hub as hub
from tests.remote_code import write_remote_code_model

TINY, CODE = "someone/tiny", "someone/code"
TOKENS = torch.tensor([[5, 9, 17, 33, 80]])


def refusal(name: str, revision: str | None = None) -> str:
    with pytest.raises(UserError) as raised:
        materialize(ModelSource(name, revision), "float32")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def files_of(folder: Path, *without: str, **more: bytes) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(without or ("-",))}
    return {**found, **more}


@pytest.mark.parametrize("shard_size", ["50GB", "30KB"])
def test_a_hub_id_gives_the_weights_of_its_files(hub: Hub, tmp_path: Path, shard_size: str) -> None:
    model = tiny_llama(torch.float32)
    model.save_pretrained(tmp_path / "tiny", max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    commit = hub.push(TINY, tmp_path / "tiny")
    made = materialize(ModelSource(TINY), "float32")
    assert made == ModelSource(TINY, commit)
    loaded = load_model(made, "float32").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())
    assert load_tokenizer(made)("the fox")["input_ids"] == tiny_tokenizer()("the fox")["input_ids"]


@pytest.mark.parametrize("name_of", [lambda commit: "v1", lambda commit: commit[:8], lambda commit: commit])
def test_a_tag_a_short_commit_and_a_commit_are_the_commit(
    hub: Hub, tiny_folder: Path, name_of: Callable[[str], str]
) -> None:
    commit = hub.push(TINY, tiny_folder, ref="v1")
    hub.push(TINY, {"README.md": b"another state"})
    assert materialize(ModelSource(TINY, name_of(commit)), "float32").revision == commit


def test_a_model_whose_branch_moves_keeps_the_code_of_its_commit(hub: Hub, tmp_path: Path) -> None:
    """Auto classes that make a model of a config take the code of the main branch, and later keep to it."""
    write_remote_code_model(tmp_path / "code")
    files = files_of(tmp_path / "code")
    hub.push(CODE, files, ref="v1")
    new = files["modeling_tinychuan.py"].replace(b"self.weight * hidden", b"2 * self.weight * hidden")
    hub.push(CODE, {**files, "modeling_tinychuan.py": new})

    def logits(revision: str | None) -> torch.Tensor:
        made = materialize(ModelSource(CODE, revision, trust_remote_code=True), "float32")
        meta_model(made, "float32")
        with torch.no_grad():
            return load_model(made, "float32")(TOKENS).logits

    local = load_model(ModelSource(str(tmp_path / "code"), trust_remote_code=True), "float32")
    with torch.no_grad():
        assert torch.equal(logits("v1"), local(TOKENS).logits)
    asked = [path for path in hub.asked if "/resolve/main/" in path and path.endswith("modeling_tinychuan.py")]
    assert asked == []
    assert not torch.equal(logits(None), logits("v1"))


def test_what_was_identified_is_what_is_loaded_if_the_branch_moves_in_between(hub: Hub, tiny_folder: Path) -> None:
    commit = hub.push(TINY, tiny_folder)
    known = identity(ModelSource(TINY))
    hub.push(TINY, {"README.md": b"another state"})
    assert known.at(ModelSource(TINY)) == ModelSource(TINY, commit)
    folder = ModelSource(str(tiny_folder))
    assert identity(folder).at(folder) == folder


def test_the_weights_decide_about_head_and_dtype_as_in_a_folder_also_before_they_were_ever_loaded(
    hub: Hub, tmp_path: Path
) -> None:
    model = tiny_llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    wrong = {**config, "tie_word_embeddings": True, "dtype": "float32"}
    hub.push(TINY, files_of(tmp_path / "tiny", **{"config.json": json.dumps(wrong).encode()}))
    hub.push("someone/other", files_of(tmp_path / "tiny", **{"config.json": json.dumps(wrong).encode()}))
    made = materialize(ModelSource(TINY), "float32")
    assert Decoder(meta_model(made, "float32")).shape.num_parameters == model.num_parameters()
    assert dtype_to_write("auto", ModelSource("someone/other"), None)[0] == "bfloat16"


def test_what_is_no_model_is_refused_before_its_files_are_fetched(hub: Hub, tiny_folder: Path) -> None:
    hub.push("someone/merged", files_of(tiny_folder, **{"adapter_config.json": b"{}"}))
    hub.push("someone/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    hub.push("someone/gguf", {"tiny-Q4_K_M.gguf": b"GGUF"})
    hub.push("someone/pickled", files_of(tiny_folder, "model", **{"pytorch_model.bin": b"x"}))
    hub.push("someone/empty", files_of(tiny_folder, "model"))
    hub.push("someone/quantised", files_of(tiny_folder, **{"quantize_config.json": b"{}"}))
    assert "with an adapter in it ('adapter_config.json')" in refusal("someone/merged")
    assert "with an adapter in it ('adapter_config.json')" in refusal("someone/adapter")
    assert "download one of its GGUF files ('tiny-Q4_K_M.gguf')" in refusal("someone/gguf")
    assert "found only pickled weights; load the model with transformers, save it" in refusal("someone/pickled")
    assert "model.safetensors.index.json in 'someone/empty', found none." in refusal("someone/empty")
    assert "quantised by gptq" in refusal("someone/quantised")
    assert not any(path.endswith((".safetensors", ".bin", ".gguf")) for path in hub.asked)
    assert materialize(ModelSource("someone/empty"), "float32", needs_weights=False).revision is not None


def test_a_text_that_is_not_there_is_told_before_weights_are_fetched(
    hub: Hub, tiny_folder: Path, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    hub.push(TINY, tiny_folder)
    with pytest.raises(UserError, match=r"'nowhere.jsonl', which does not exist"):
        run_search(config(model=TINY, calibration="nowhere.jsonl", num_remove=1), tmp_path / "run", reporter)
    evaluation = EvaluationConfig(model=TINY, perplexity=("nowhere.jsonl",), no_ray=True)
    with pytest.raises(UserError, match=r"'nowhere.jsonl', which does not exist"):
        evaluate_model(evaluation, reporter)
    with pytest.raises(UserError, match=r"'nowhere.jsonl', which does not exist"):
        shrink_model(ShrinkConfig.of(model=TINY, calibration="nowhere.jsonl"), tmp_path / "out", reporter)
    assert not any(path.endswith(".safetensors") for path in hub.asked)


def test_a_gated_repository_says_how_to_get_in(hub: Hub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(TINY, tiny_folder)
    hub.repositories[f"models/{TINY}"].is_gated = True
    assert f"'{TINY}' is gated: ask for access at {hub.endpoint}/{TINY}, and log in" in refusal(TINY)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "is gated" in refusal(TINY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert materialize(ModelSource(TINY), "float32").revision is not None


def test_wrong_names_and_revisions_are_told_apart(hub: Hub, tiny_folder: Path) -> None:
    hub.push(TINY, tiny_folder)
    missing = refusal("someone/tyni")
    assert missing.startswith("expected a Hugging Face id")
    assert "the hub does not show; correct it" in missing
    for revision in ("v9", "0" * 40):
        assert f"expected `revision` to be a branch, a tag or a commit of '{TINY}', got '{revision}'" in refusal(
            TINY, revision
        )


def test_a_hub_that_fails_is_told_and_the_cache_does_without_it(hub: Hub, tiny_folder: Path) -> None:
    hub.push(TINY, tiny_folder)
    hub.push("someone/other", tiny_folder)
    made = materialize(ModelSource(TINY), "float32")
    load_tokenizer(made), load_model(made, "float32")
    hub.failing = 503
    again = materialize(ModelSource(TINY), "float32")
    assert again == made
    assert torch.equal(load_model(again, "float32").lm_head.weight, load_model(made, "float32").lm_head.weight)
    load_tokenizer(again)
    assert f"({hub.endpoint}) answers 503 for 'someone/other'; try again later" in refusal("someone/other")


def test_offline_works_from_the_cache_alone(hub: Hub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(TINY, tiny_folder)
    made = materialize(ModelSource(TINY), "float32")
    load_tokenizer(made), load_model(made, "float32")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    hub.asked.clear()
    again = materialize(ModelSource(TINY), "float32")
    load_tokenizer(again), load_model(again, "float32")
    assert again == made
    assert hub.asked == []
    assert "HF_HUB_OFFLINE is set, so it is not fetched" in refusal("someone/other")


def test_a_line_that_breaks_within_a_file_leaves_nothing_half_done(hub: Hub, tiny_folder: Path) -> None:
    hub.push(TINY, tiny_folder)
    hub.cut_after = 1000
    for load in (load_tokenizer, lambda source: load_model(source, "float32")):
        with pytest.raises(UserError, match=r"cannot fetch 'someone/tiny' from the Hugging Face hub .* run the same"):
            load(ModelSource(TINY))
    assert "cannot fetch 'someone/tiny'" in refusal(TINY)
    hub.cut_after = None
    made = materialize(ModelSource(TINY), "float32")
    load_tokenizer(made), load_model(made, "float32")


def test_a_pruned_model_of_the_hub_takes_tokenizer_code_and_licence_along(
    hub: Hub, tiny_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    files = files_of(tiny_folder, LICENSE=b"the terms", **{"own.tiktoken": b"x"})
    commit = hub.push(TINY, {**files, "original/consolidated.model": b"large"})
    sequence = tmp_path / "order.json"
    sequence.write_text(json.dumps({"1": [["mlp", 2]]}))
    calls.prune_to(tmp_path / "pruned", reporter, model=TINY, sequence=sequence)
    written = {file.name: file.read_bytes() for file in (tmp_path / "pruned").iterdir()}
    assert (written["LICENSE"], written["own.tiktoken"]) == (b"the terms", b"x")
    assert written["tokenizer.json"] == files["tokenizer.json"]
    assert json.loads(written["blockpruner.json"])["base_fingerprint"] == commit
    assert not any("consolidated" in path for path in hub.asked)


def test_named_texts_are_read_from_the_hub_and_a_changed_one_is_told(hub: Hub) -> None:
    texts = [f"text {number}" for number in range(40)]
    hub.push("tatsu-lab/alpaca", {"data/train-00000-of-00001.parquet": _table(text=texts)}, kind="datasets")
    assert set(rows_of("alpaca", "text", train=True).values) < set(texts)
    hub.push("tatsu-lab/alpaca", {"data/train-00000-of-00001.parquet": _table(words=texts)}, kind="datasets")
    with pytest.raises(UserError, match="expected a column 'text' in 'tatsu-lab/alpaca' on the hub, got words"):
        rows_of("alpaca", "text", train=True)
    with pytest.raises(UserError, match="cannot read 'Salesforce/wikitext' from the hub"):
        rows_of("wikitext2", "text", train=True)


def test_a_search_asks_the_hub_a_few_times_in_all(
    hub: Hub, tiny_folder: Path, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    hub.push(TINY, tiny_folder)
    run_search(config(model=TINY, num_remove=1), tmp_path / "run", reporter)
    hub.asked.clear()
    run_search(config(model=TINY, num_remove=3), tmp_path / "run", reporter)
    assert len(hub.asked) <= 8, hub.asked


def _table(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()
