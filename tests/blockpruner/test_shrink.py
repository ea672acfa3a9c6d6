"""`shrink`: the whole way in one command, each part where it was left, and as much as goes within a bound."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import blockpruner as bp
from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import ModelSource
from blockpruner.reporting.config import ReportConfig
from blockpruner.showing.console import Reporter
from blockpruner.shrinking import shrinking
from blockpruner.shrinking.config import ShrinkConfig
from tests.conftest import TEXT, generate, load, tiny_tokenizer, write_tiny
from tests.engine.architectures import HYBRIDS, ROWS, SHARED, Row
from tests.hub import HubCache

OPTIONS: dict[str, Any] = {"num_samples": 12, "seq_len": 16, "dtype": "float32", "no_ray": True}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[number:] * 2}) + "\n" for number in range(16)))
    return path


SPEEDS = {"prefill_tokens_per_s": 2.0, "decode_tokens_per_s": 1.0}
MEASURED = {"dense": SPEEDS, "pruned": SPEEDS, "ratio": SPEEDS}


def _page(config: ReportConfig, reporter: Reporter) -> None:
    assert config.out is not None
    config.out.mkdir()
    (config.out / "report.html").touch()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes that measure speeds, and without pictures."""
    monkeypatch.setattr(shrinking, "measure_latency", lambda *given: MEASURED)
    monkeypatch.setattr(shrinking, "write_report", _page)


@pytest.fixture
def call(tiny_folder: Path, rows: Path, tmp_path: Path, reporter: Reporter) -> Any:
    def call(out: str = "out", **options: Any) -> dict[str, Any]:
        given = {"model": str(tiny_folder), "calibration": (str(rows),), **OPTIONS, **options}
        config = ShrinkConfig.of(**given)
        return shrinking.shrink_model(config, tmp_path / out, reporter)

    return call


@pytest.fixture
def spaceless(tmp_path: Path) -> str:
    """A model whose tokenizer a GGUF can hold."""
    folder = write_tiny(tmp_path / "spaceless")
    tiny_tokenizer(adds_space=False).save_pretrained(folder)
    return str(folder)


def stop(*given: object) -> None:
    raise KeyboardInterrupt


def test_one_command_gives_a_model_that_loads_and_all_that_was_measured(
    call: Any, rows: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    result = call(num_remove=1, export="deci", perplexity=(str(rows),))
    out = tmp_path / "out"
    model = load(out / "model")
    assert generate(model) == generate(model, use_cache=False)
    assert sum(weight.numel() for weight in model.parameters()) == result["num_parameters"]
    assert len(result["removed"]) == 1, "one layer"
    assert json.loads((out / "model" / "blockpruner.json").read_text())["compensation"]["method"] in ("both", "none")
    assert (out / "report" / "report.html").exists()
    assert load(out / "deci")(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
    found = result["perplexity"]
    assert found.keys() == {"kept-back windows", str(rows)}
    assert all(values.keys() == {"dense", "pruned", "model"} for values in found.values())
    assert list(result["part_s"]) == ["search", "prune", "compensate", "evaluate", "latency", "report", "export deci"]
    small, _ = bp.load(tiny_folder, dtype="float32")
    assert found[str(rows)]["dense"] == pytest.approx(
        bp.perplexity(small, bp.test_text(rows, bp.load(tiny_folder)[1], seq_len=16)), rel=1e-6
    )


@pytest.mark.usefixtures("quick")
def test_what_is_kept_back_was_seen_by_neither_the_search_nor_the_fit(call: Any, tmp_path: Path) -> None:
    call(num_remove=1)
    out = tmp_path / "out"
    searched = json.loads((out / "run" / "run.json").read_text())["calibration"]["num_windows"]
    fitted = json.loads((out / "model" / "blockpruner.json").read_text())["compensation"]
    told = json.loads((out / "shrink.json").read_text())
    assert searched == 16
    assert fitted["num_tokens"] < told["num_samples"] * 200
    assert told["windows"] != fitted["fingerprint"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stopped_in", [pytest.param("prune_model", marks=pytest.mark.slow), "measure_latency"])
def test_a_stopped_call_goes_on_where_it_was(call: Any, monkeypatch: pytest.MonkeyPatch, stopped_in: str) -> None:
    expected = call("whole", num_remove=1)

    with monkeypatch.context() as patched:
        patched.setattr(shrinking, stopped_in, stop)
        with pytest.raises(KeyboardInterrupt):
            call(num_remove=1)
    result = call(num_remove=1)
    assert result["removed"] == expected["removed"]
    assert result["perplexity"] == expected["perplexity"]
    again = call(num_remove=1)
    assert sum(again["part_s"][name] for name in ("prune", "compensate", "evaluate", "latency", "report")) == 0


@pytest.mark.usefixtures("quick")
def test_the_bound_is_kept_by_the_most_removals_that_keep_it(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 for the dense model, and one more for each block that is gone."""
    judged: list[str] = []

    def judge(way: shrinking.Way, which: str, model: ModelSource) -> float:
        judged.append(which)
        path = Path(model.name) / "blockpruner.json"
        return 10.0 + (len(json.loads(path.read_text())["removed"]) if path.exists() else 0)

    monkeypatch.setattr(shrinking.Way, "judged", judge)
    options = {"blocks": "mix", "no_compensate": True}
    result = call("bound", max_perplexity_increase="25%", **options)
    assert len(result["removed"]) == 2
    assert judged[0] == "dense"
    assert not (tmp_path / "bound" / "tries").exists()
    with pytest.raises(UserError, match=r"raises the perplexity by at most 5%; the first one raises it by 10%"):
        call("none", max_perplexity_increase=0.05, **options)
    num_judged = len(judged)
    with pytest.raises(UserError, match="the first one raises it by 10%"):
        call("none", max_perplexity_increase=0.05, **options)
    assert len(judged) == num_judged, "what was judged is not judged again"


def test_a_dry_run_writes_nothing_and_gives_the_command_of_each_part(
    call: Any, spaceless: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(num_remove=1, dry_run=True, model=spaceless, export="gguf", gguf_type="q8_0")
    assert not (tmp_path / "out").exists()
    commands = {part["name"]: part["command"] for part in result["parts"]}
    assert commands["search"].startswith("blockpruner search ")
    assert "--strategy lazy" in commands["search"]
    assert "--format gguf --gguf-type q8_0" in commands["export gguf"]
    assert set(result["expected_s"]) == {"search", "compensate"}
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"search, about \d+ s for greedy \(how much lazy saves is not known here\): blockpruner", told)


@pytest.mark.parametrize(
    ("options", "is_per_parameter"),
    [
        ({"blocks": "mix", "ratio": 0.1}, True),
        ({"blocks": "mix", "max_perplexity_increase": 0.2}, True),
        ({"blocks": "mix", "num_remove": 2}, False),
        ({"blocks": "mha", "ratio": 0.1}, False),
        ({"units": "channels", "ratio": 0.1}, False),
        ({"ratio": 0.1}, False),
    ],
    ids=str,
)
def test_a_share_of_both_kinds_of_blocks_is_searched_per_parameter(
    call: Any, options: dict[str, Any], *, is_per_parameter: bool
) -> None:
    command = {part["name"]: part["command"] for part in call(dry_run=True, **options)["parts"]}["search"]
    assert ("--per params" in command) is is_per_parameter


def test_every_part_is_told_the_revision_and_whether_the_models_code_may_run(call: Any) -> None:
    result = call(num_remove=1, dry_run=True, revision="v2", trust_remote_code=True)
    commands = {part["name"]: part["command"] for part in result["parts"]}
    assert all("--trust-remote-code" in commands[name] for name in ("search", "prune", "compensate", "latency"))
    assert all("--revision v2" in commands[name] for name in ("search", "prune"))
    assert "--dense" not in commands["latency"], "the checkpoint names it, with its revision"


@pytest.mark.parametrize("options", [{"no_compensate": True}, {"max_perplexity_increase": 0.2}], ids=str)
def test_no_command_is_told_that_does_something_else(call: Any, options: dict[str, Any]) -> None:
    commands = {part["name"]: part["command"] for part in call(dry_run=True, **options)["parts"]}
    assert commands["compensate"] is None
    assert (commands["prune"] is None) == ("max_perplexity_increase" in options)


def test_what_cannot_be_compensated_is_refused_before_anything_is_searched(
    rows: Path, tmp_path: Path, reporter: Reporter
) -> None:
    ROWS["gemma4"].model().float().save_pretrained(tmp_path / "gemma4")
    config = ShrinkConfig.of(model=str(tmp_path / "gemma4"), calibration=(str(rows),), **OPTIONS)
    with pytest.raises(UserError, match="'gemma4_text' cannot be compensated"):
        shrinking.shrink_model(config, tmp_path / "out", reporter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        (ROWS["cohere"], "deci", "the deci format cannot express this model: it is for Llama"),
        (ROWS["cohere"], "gguf", "the gguf format cannot express this model: it is for Llama"),
        (SHARED, "vanilla", "expected a model whose layers are given their stream alone"),
        (HYBRIDS["nemotron_h"], "vanilla", "its layers have one block each"),
        (None, "gguf", "expected a tokenizer that changes no text before it splits it"),
    ],
    ids=["deci", "gguf", "vanilla, shared", "vanilla, hybrid", "tokenizer"],
)
def test_formats_that_cannot_hold_the_model_are_refused_before_anything_is_searched(
    call: Any, tmp_path: Path, row: Row | None, name: str, message: str
) -> None:
    folder = write_tiny(tmp_path / "dense")
    if row is not None:
        row.model().float().save_pretrained(folder)
    with pytest.raises(UserError, match=message):
        call(num_remove=1, model=str(folder), export=f"grouped,{name}", no_compensate=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_a_gguf_is_written_too_with_narrower_blocks(call: Any, spaceless: str, tmp_path: Path) -> None:
    call(num_remove=1, model=spaceless, units="channels", export="gguf")
    assert (tmp_path / "out" / "gguf" / "model.gguf").stat().st_size > 0
    call(num_remove=1, model=spaceless, units="channels", export="grouped,gguf")  # formats may be added
    assert (tmp_path / "out" / "grouped" / "config.json").exists()


@pytest.mark.usefixtures("quick")
def test_a_folder_in_which_nothing_could_begin_takes_other_options(call: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected `ratio` of at most"):
        call(ratio=0.97)
    assert [path.name for path in (tmp_path / "out").iterdir()] in ([], [".lock"])
    call(num_remove=1)


def test_another_wish_in_the_same_folder_is_refused(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinking, "prune_model", stop)
    with pytest.raises(KeyboardInterrupt):
        call(num_remove=1)
    with pytest.raises(UserError, match="was begun with other options: `num_remove` was 1, now 2"):
        call(num_remove=2)
    begun = json.loads((tmp_path / "out/shrink.json").read_text())
    assert (begun["blocks"], begun.pop("units")) == ("layer", "blocks")
    (tmp_path / "out/shrink.json").write_text(json.dumps(begun))  # as before there were units
    with pytest.raises(KeyboardInterrupt):
        call(num_remove=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"an empty folder for `out`, got .*full.* with 'thesis.txt' in it"):
        call("full", num_remove=1)


WRONG = [
    ({"ratio": 0.2, "num_remove": 1}, "expected one of `ratio`, `num_remove` or `max_perplexity_increase`, got 2"),
    ({"export": "onnx"}, "expected `export` to be .*, got 'onnx'"),
    ({"export": "vanilla", "units": "channels"}, "expected `export` grouped, deci or gguf with `units=channels`"),
    ({"gguf_type": "f32"}, "expected `gguf_type` with `export=gguf`"),
    ({"max_perplexity_increase": "lots"}, "expected `max_perplexity_increase` such as 20%, got 'lots'"),
    ({"ratio": 1.5}, "expected `ratio` between 0 and 1"),
    ({"num_windows": 3}, "expected text for at least 4 windows of 16 tokens"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_what_cannot_be_done_is_refused(call: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(**options)


def test_a_share_may_be_given_in_percent() -> None:
    assert ShrinkConfig.of(model="x", max_perplexity_increase="20%").max_perplexity_increase == 0.2


def test_groups_of_blocks_may_go_one_by_one(call: Any, quick: None, tmp_path: Path) -> None:
    told = call(units="all", num_remove=3)
    assert len(told["removed"]) == 3
    made = load(tmp_path / "out" / "model", "float32")
    assert made.num_parameters() == told["num_parameters"]
    with pytest.raises(UserError, match="expected `blocks` mix or mlp with `units=channels`, got `blocks=layer`"):
        call("other", units="channels", blocks="layer")
    assert not (tmp_path / "other").exists()


def test_a_hub_id_whose_branch_moves_is_not_mixed_with_the_model_that_the_folder_began_with(
    call: Any, quick: None, hub_cache: HubCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model that is judged must be the one that was searched."""
    one, other = "a" * 40, "b" * 40
    write_tiny(hub_cache.snapshot("someone/tiny", one))
    options = {"model": "someone/tiny", "num_remove": 1, "no_compensate": True}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shrinking, "perplexities", stop)
        call(**options)
    write_tiny(hub_cache.snapshot("someone/tiny", other), seed=1)
    with pytest.raises(UserError, match=f"begun with another model: .*{one}.*now it is .*{other}.*`revision={one}`"):
        call(**options)
    call(**options, revision=one)
    made = json.loads((tmp_path / "out" / "model" / "blockpruner.json").read_text())
    assert (made["base_model"], made["revision"]) == ("someone/tiny", one)
