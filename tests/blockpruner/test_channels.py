"""`search --units channels` and all that follows it: the same bits after stops and for any number of replicas, and
narrower models in every format."""

import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import blockpruner as bp
from blockpruner.compensating.choosing import Split
from blockpruner.compensating.in_memory import compensate_in_memory
from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.channels import CHANNELS_FILE, ChannelOrder
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.evaluation import mean_nll
from blockpruner.engine.model.surgery import prune
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.reporting.recorded import read_recorded
from blockpruner.reporting.tables import tabulate_overview
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import Removals, read_history, read_summary
from blockpruner.searching.records import ChannelsRecord
from blockpruner.showing.console import Reporter
from tests import calls
from tests.blockpruner.recorded import units_and_steps
from tests.conftest import TEXT, load, tiny_tokenizer
from tests.engine.architectures import ROWS
from tests.processes import finish

Search = Callable[..., Path]
NUM_WINDOWS = 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return tmp_path / "text.txt"


@pytest.fixture
def search(trained_folder: Path, text: Path, tmp_path: Path, reporter: Reporter) -> Search:
    def call(out: str = "run", **options: Any) -> Path:
        given = {
            "model": str(trained_folder), "calibration": str(text), "num_samples": 40, "seq_len": 16,
            "num_windows": NUM_WINDOWS, "units": "channels", "dtype": "float64", "num_remove": 6,
            "threads_per_replica": 1, "no_ray": True,
        }  # fmt: skip
        run_search(SearchConfig.of(**{**given, **options}), tmp_path / out, reporter)
        return tmp_path / out

    return call


def recorded(run: Path) -> list[Any]:
    """What two runs must agree on: the order of the channels, all units and steps but times and names."""
    history = read_history(run / "ledger.jsonl")
    return [history.all(ChannelsRecord)[0].digest, *units_and_steps(history)]


def test_every_score_of_a_search_is_that_of_a_physically_narrower_model(
    search: Search, trained_folder: Path, text: Path
) -> None:
    run = search(num_remove=4)
    history = read_history(run / "ledger.jsonl")
    dense, tokenizer = bp.load(trained_folder, dtype="float64")
    windows = bp.calibration(text, tokenizer, num_samples=40, seq_len=16, num_windows=NUM_WINDOWS).tokens
    order = ChannelOrder.read(run / CHANNELS_FILE)
    masks = [(mask, sums) for phase in range(1, 5) for mask, sums in history.sums(phase).sums.items()]
    assert any(mask.lacking for mask, _ in masks)
    for mask, sums in masks:
        nlls = [mean_nll(prune(dense, mask, order), window) * 15 for window in windows[:2]]
        assert nlls == pytest.approx([sums[0], sums[1]], rel=1e-10)


def test_groups_of_channels_go_one_by_one_and_with_the_last_one_the_block(search: Search) -> None:
    steps = read_summary(search(num_remove=8, blocks="mlp", keep=("mlp.0", "mlp.1")))["steps"]
    blocks = [Block.from_json(step["block"]) for step in steps]
    for layer in (2, 3):
        assert [str(block) for block in blocks if block.layer == layer] == [
            f"mlp.{layer}/4", f"mlp.{layer}/3", f"mlp.{layer}/2", f"mlp.{layer}",
        ]  # fmt: skip
    assert steps[-1]["ratio"] == pytest.approx(2 * (3 * 32 * 48 + 32) / 34_976, rel=0.2)


def test_the_ratio_of_a_narrower_model_is_exact(
    search: Search, trained_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    run = search(ratio=0.2, num_remove=None, per="params")
    made = prune_model(PruneConfig.of(model=str(trained_folder), run=run), tmp_path / "out", reporter)
    steps = read_summary(run)["steps"]
    assert made["ratio"] == steps[-1]["ratio"] >= 0.2
    assert made["num_parameters"] == round(made["num_parameters_dense"] * (1 - made["ratio"]))


def test_attentions_and_mlps_go_in_groups_in_one_search(
    search: Search, trained_folder: Path, text: Path, tmp_path: Path, reporter: Reporter
) -> None:
    run = search(units="all", num_remove=9, strategy="lazy", audit=2)
    summary = read_summary(run)
    blocks = [Block.from_json(step["block"]) for step in summary["steps"]]
    assert {block.kind for block in blocks if block.part} == {Kind.MHA, Kind.MLP}
    assert summary["audit"]["num_agreed"] == 2
    made = prune_model(PruneConfig.of(model=str(trained_folder), run=run), tmp_path / "out", reporter)
    assert made["num_parameters"] == round(made["num_parameters_dense"] * (1 - made["ratio"]))
    _, tokenizer = bp.load(trained_folder, dtype="float64")
    windows = bp.calibration(text, tokenizer, num_samples=40, seq_len=16, num_windows=NUM_WINDOWS)
    pruned = load(tmp_path / "out", "float32")
    assert bp.perplexity(pruned, windows) == pytest.approx(summary["steps"][-1]["perplexity"], rel=1e-5)


def test_lazy_finds_the_order_of_greedy_and_the_audit_agrees(search: Search) -> None:
    greedy, lazy = search("greedy"), search("lazy", strategy="lazy", audit=3)
    assert recorded(lazy)[2] == recorded(greedy)[2]
    assert read_summary(lazy)["audit"]["num_agreed"] == 3


@pytest.mark.parametrize("strategy", ["greedy", "lazy"])
def test_a_grown_run_has_the_bits_of_one_in_one_go_also_without_its_order(
    search: Search, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = recorded(search("whole", strategy=strategy))
    run = search("grown", strategy=strategy, num_remove=2)
    (run / CHANNELS_FILE).unlink()
    search("grown", strategy=strategy, num_remove=4)
    assert "computing it again" in capsys.readouterr().out
    (run / CHANNELS_FILE).write_bytes((run / CHANNELS_FILE).read_bytes()[:-1])
    assert recorded(search("grown", strategy=strategy)) == whole


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"PK")], ids=["lost", "damaged"])
def test_the_order_of_a_finished_run_comes_back_by_the_same_search(search: Search, damage: Any) -> None:
    run = search("run")
    order = (run / CHANNELS_FILE).read_bytes()
    whole = recorded(run)
    damage(run / CHANNELS_FILE)
    assert recorded(search("run")) == whole
    assert (run / CHANNELS_FILE).read_bytes() == order


def test_a_lost_order_that_comes_out_otherwise_is_not_gone_on_with(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = search("run", num_remove=1)
    order = ChannelOrder.read(run / CHANNELS_FILE)
    other = ChannelOrder({block: channels[::-1].copy() for block, channels in order.channels.items()})
    (run / CHANNELS_FILE).unlink()
    monkeypatch.setattr("blockpruner.searching.channels.channel_order", lambda *given: other)
    with pytest.raises(UserError, match="the channels come in another order than when"):
        search("run", num_remove=2)
    assert not (run / CHANNELS_FILE).exists()


def test_a_streamed_model_gives_the_bits_of_a_resident_one(search: Search) -> None:
    asked = {"units": "all", "dtype": "float32", "strategy": "lazy"}
    assert recorded(search("streamed", placement="streamed", **asked)) == recorded(search("resident", **asked))


@pytest.mark.slow
def test_two_replicas_give_the_bits_of_one(search: Search, trained_folder: Path, text: Path, tmp_path: Path) -> None:
    finish(
        [
            sys.executable, "-m", "blockpruner", "search", str(trained_folder), "--calibration", str(text),
            "--num-samples", "40", "--seq-len", "16", "--num-windows", str(NUM_WINDOWS), "--units", "channels",
            "--dtype", "float64", "--num-remove", "6", "--threads-per-replica", "1", "--replicas", "2", "--out",
            str(tmp_path / "two"),
        ]
    )  # fmt: skip
    assert recorded(tmp_path / "two") == recorded(search("one"))


def test_a_model_in_memory_is_as_it_was_and_is_pruned_there(trained_folder: Path, text: Path, tmp_path: Path) -> None:
    model, tokenizer = bp.load(trained_folder, dtype="float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    windows = bp.calibration(text, tokenizer, num_samples=40, seq_len=16, num_windows=32)
    found = bp.search(model, windows, num_remove=7, units="channels", threads_per_replica=1)
    assert found.mask.lacking
    small = bp.prune(model, found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    folder = bp.save(small, tokenizer, tmp_path / "saved")
    assert torch.equal(load(folder)(windows.tokens).logits, small(windows.tokens).logits)
    with pytest.raises(UserError, match="expected the order of the 48 channels"):
        bp.prune(model, ["mlp.1/4"])
    same = bp.prune(model, [str(block) for block in found.order], channels=found.channels)
    assert torch.equal(same(windows.tokens).logits, small(windows.tokens).logits)
    with pytest.raises(UserError, match="expected `channels` beside blocks"):
        bp.prune(model, found, channels=found.channels)


def test_a_compensated_narrower_model_is_better_and_has_the_loss_of_its_fit(
    trained_folder: Path, text: Path, tmp_path: Path, reporter: Reporter
) -> None:
    """Which channels go is drawn at random, so that there is something to make up for."""
    dense, tokenizer = bp.load(trained_folder, dtype="float64")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    windows = bp.calibration(text, tokenizer, num_samples=40, seq_len=16, num_windows=48)
    draw = np.random.default_rng(0)
    order = ChannelOrder(
        {
            **{Block(Kind.MLP, layer): draw.permutation(48).astype(np.int32) for layer in range(4)},
            Block(Kind.MHA, 1): np.array([1, 0], dtype=np.int32),
        }
    )
    mask = Mask.parse("mha.1/2+mlp.1/4+mlp.1/3+mlp.1/2+mha.2+mlp.2/4+mlp.2/3+mlp.3")
    pruned = prune(dense, mask, order)
    made, found = compensate_in_memory(pruned, dense, windows, Fit.of(method="both", ridge=0.1), reporter, order)
    held_out = Windows(Split.of(windows).held_out, 1)
    trial = found.nlls["both with ridge 0.1"]
    assert {Block(Kind.MHA, 1), Block(Kind.MLP, 1)} <= found.changed.keys()
    assert trial < 0.9 * found.nlls["pruned"]
    assert math.log(bp.perplexity(made, held_out)) == pytest.approx(trial, rel=1e-9)
    assert math.log(bp.perplexity(pruned, held_out)) == pytest.approx(found.nlls["pruned"], rel=1e-9)
    assert made.model.layers[1].mlp.down_proj.weight.shape == (32, 12)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.fixture(scope="module")
def found(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run that narrowed MLPs, the checkpoint without its removals, and the calibration text."""
    root = tmp_path_factory.mktemp("found")
    (root / "text.txt").write_text(TEXT * 40)
    options = {
        "model": str(trained_folder), "calibration": str(root / "text.txt"), "num_samples": 40, "seq_len": 16,
        "num_windows": NUM_WINDOWS, "units": "channels", "dtype": "float32", "num_remove": 6,
        "threads_per_replica": 1, "no_ray": True, "strategy": "lazy",
    }  # fmt: skip
    reporter = Reporter(Console(quiet=True))
    run_search(SearchConfig.of(**options), root / "run", reporter)
    calls.prune_to(root / "pruned", reporter, model=str(trained_folder), run=root / "run")
    return root / "run", root / "pruned", root / "text.txt"


def test_a_removal_order_with_groups_is_pruned_with_the_order_beside_it(
    found: tuple[Path, Path, Path], trained_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    run, pruned, _ = found
    sequence = run / "sequence.json"
    calls.prune_to(tmp_path / "out", reporter, model=str(trained_folder), sequence=sequence)
    for name in ("model.safetensors", "config.json", CHANNELS_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes(), name
    moved = tmp_path / "order.json"
    moved.write_bytes(sequence.read_bytes())
    with pytest.raises(UserError, match=r"expected the order of the channels of narrower blocks in .*channels\.npz"):
        calls.prune_to(tmp_path / "again", reporter, model=str(trained_folder), sequence=moved)


def test_a_run_is_judged_without_writing_its_models(
    found: tuple[Path, Path, Path], trained_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    run, pruned, text = found
    options = {"perplexity": (str(text),), "seq_len": (16,), "num_windows": 4, "dtype": "float32", "no_ray": True}
    of_run = EvaluationConfig.of(model=str(trained_folder), run=run, **options)
    of_folder = EvaluationConfig.of(model=str(pruned), **options)
    (one, other) = (evaluate_model(config, reporter)["perplexity"][str(text)] for config in (of_run, of_folder))
    assert one["value"] == pytest.approx(other["value"], rel=1e-6)


def test_a_narrower_checkpoint_is_compensated_and_exported(
    found: tuple[Path, Path, Path], tmp_path: Path, reporter: Reporter
) -> None:
    _, pruned, text = found
    calls.compensate(
        tmp_path / "better", reporter, folder=pruned, calibration=str(text), num_samples=40, seq_len=16,
        num_windows=32, method="both", ridge=0.1, dtype="float32", no_ray=True, threads_per_replica=1,
    )  # fmt: skip
    assert (tmp_path / "better" / CHANNELS_FILE).read_bytes() == (pruned / CHANNELS_FILE).read_bytes()
    ids = torch.arange(3, 40)[None]
    for form in ("grouped", "deci"):
        calls.export(tmp_path / "better", tmp_path / form, reporter, format=form)
        torch.testing.assert_close(
            load(tmp_path / form, "float32")(ids).logits, load(tmp_path / "better", "float32")(ids).logits
        )
    assert re.search(
        r"\| channels of MLPs \(in 4ths\) removed in layers \| \d \(\d\)", (tmp_path / "deci" / "README.md").read_text()
    )
    with pytest.raises(UserError, match="expected `gguf_type` f32, f16 or q8_0 for a checkpoint with narrower blocks"):
        calls.export(tmp_path / "better", tmp_path / "gguf", reporter, format="gguf", base="base.gguf")


def test_the_report_shows_the_groups(found: tuple[Path, Path, Path], tmp_path: Path, reporter: Reporter) -> None:
    calls.report([found[0]], tmp_path / "report", reporter)
    (page,) = (tmp_path / "report").glob("*.html")
    removed = [Block.from_json(step["block"]) for step in read_summary(found[0])["steps"]]
    assert str(next(block for block in removed if block.part)) in page.read_text()
    mask = Mask.of(removed)
    num_groups = sum(mask.lacking.values())
    assert 0 < num_groups < len(removed)
    groups = f"{num_groups} group{'s' * (num_groups > 1)} of channels"
    (recorded,) = read_recorded([found[0]])
    row = next(row for row in tabulate_overview([recorded]).rows if row[0] == "removed")
    num_whole = len(mask.absent) - num_groups
    assert row[1] == f"{num_whole} of {recorded.num_blocks} blocks and {groups}"
    assert f"{num_whole} blocks and {groups} removed</title>" in page.read_text()
    calls.export(found[1], tmp_path / "grouped", reporter, format="grouped")
    assert f"without {num_whole} of its blocks and {groups}, removed" in (tmp_path / "grouped/README.md").read_text()


def test_groups_are_not_told_as_blocks(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    run = search("evolution", strategy="evolution", generations=1, offspring=2, num_remove=9)
    told = capsys.readouterr().out.replace("\n", " ")
    assert re.search(r"generation 1: [^:]*groups? of channels removed", told)
    assert "9 blocks" not in told
    removals, notes = Removals.read(run), list[str]()
    removals.steps[1].update({"nll": None, "perplexity": None})
    removals.warn_if_unscored(2, notes.append)
    assert "chose all 9 blocks and parts of blocks together; the first 2 alone" in notes[0]
    search(num_remove=3)
    with pytest.raises(UserError, match="has already removed 3 blocks and parts of blocks; the target may grow"):
        search(num_remove=2)


def test_a_damaged_order_is_found(found: tuple[Path, Path, Path], tmp_path: Path, trained_folder: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(found[0], run)
    order = ChannelOrder.read(run / CHANNELS_FILE)
    ChannelOrder({**order.channels, Block(Kind.MLP, 0): order.channels[Block(Kind.MLP, 0)][::-1].copy()}).write(
        run / CHANNELS_FILE
    )
    with pytest.raises(UserError, match="it is not the order that the run recorded"):
        bp.prune(trained_folder, run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "one-shot"}, "expected `units` with `strategy=evolution`, `strategy=greedy`, `strategy=lazy` or"),
        ({"blocks": "layer"}, "expected `blocks` mix or mlp with `units=channels`"),
        ({"units": "heads", "blocks": "mlp"}, "expected `blocks` mix or mha with `units=heads`"),
        ({"compensate": True}, "expected `units=blocks` with `compensate`"),
        ({"units": "all", "per": "ms", "times": Path("times.json")}, "expected `units` blocks or channels with"),
        ({"keep": ("mlp.1/4",)}, "expected whole blocks for `keep`"),
        ({"num_remove": 20}, "expected `num_remove` from 1 to 19"),
    ],
)
def test_what_does_not_go_together_is_refused(search: Search, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(**options)


def test_a_model_without_such_mlps_is_refused_before_it_is_loaded(
    tmp_path: Path, text: Path, reporter: Reporter
) -> None:
    ROWS["opt"].model().float().save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    options = {"model": str(tmp_path / "opt"), "calibration": str(text), "num_samples": 40, "seq_len": 16}
    config = SearchConfig.of(**options, units="channels", num_remove=2, no_ray=True)
    with pytest.raises(UserError, match="got one whose MLPs can only be removed as a whole; use `units=blocks`"):
        run_search(config, tmp_path / "run", reporter)
