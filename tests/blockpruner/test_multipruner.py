"""MultiPruner as a strategy and as a compared method: three stages up to their shares, channels by their weights."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import blockpruner as bp
from blockpruner.comparing import comparing
from blockpruner.comparing.comparing import compare_methods
from blockpruner.comparing.config import CompareConfig
from blockpruner.engine.blocks import Block, Granularity, Kind, Mask, OrderedBy, Units
from blockpruner.engine.calibration import Windows
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.score import Score
from blockpruner.engine.scoring.narrowing import NarrowingReplica, channel_order
from blockpruner.engine.scoring.reference import plain_score
from blockpruner.engine.scoring.scorer import LocalScorer
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.oracle import Found, Round, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.strategies.multipruner import MultiPruner
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import read_history
from blockpruner.searching.records import ChannelsRecord
from blockpruner.showing.console import Reporter
from blockpruner.timing.config import LatencyConfig
from tests.blockpruner.recorded import units_and_steps
from tests.calls import compare_config
from tests.conftest import OPTIONS, load, random_windows, tiny_llama, tiny_tokenizer, write_tiny
from tests.engine.architectures import ROWS
from tests.processes import finish

BOTH = (Kind.MHA, Kind.MLP)


def by_weights(model: PreTrainedModel) -> ChannelOrder:
    """The order of the channels by hand, with numpy: KV head h has the query heads 2h and 2h + 1, and the code of
    MultiPruner counts its rows of keys and values once for each of them."""
    order = {}
    for layer, module in enumerate(model.model.layers):
        norm = {
            name: np.abs(linear.weight.detach().double().numpy()).sum(1)
            for name, linear in module.named_modules()
            if isinstance(linear, torch.nn.Linear)
        }
        order[Block(Kind.MLP, layer)] = norm["mlp.gate_proj"] + norm["mlp.up_proj"]
        of_head = {name: norm[f"self_attn.{name}_proj"].reshape(-1, 8).sum(1) for name in "qkv"}
        repeated = of_head["q"] + np.repeat(of_head["k"] + of_head["v"], 2)
        order[Block(Kind.MHA, layer)] = repeated.reshape(-1, 2).sum(1)
    return ChannelOrder({block: np.argsort(-values).astype(np.int32) for block, values in order.items()})


def plain_multipruner(model: PreTrainedModel, windows: torch.Tensor, ratio: float, order: ChannelOrder) -> list[Block]:
    """The three loops of MultiPruner's code, with a physically narrower model for each candidate, whose parameters are
    counted."""
    layers, removed = range(model.config.num_hidden_layers), list[Block]()
    groups = {Kind.MLP: 4, Kind.MHA: model.config.num_key_value_heads}

    def gone() -> float:
        small = prune(model, Mask.of(removed), order) if removed else model
        return 1 - sum(weight.numel() for weight in small.parameters()) / model.num_parameters()

    def remove_best(candidates: list[Block]) -> None:
        losses = [plain_score(model, Mask.of([*removed, block]), windows, order).value for block in candidates]
        removed.append(candidates[losses.index(min(losses))])

    while gone() < 0.44 * ratio:
        whole = [Block(kind, layer) for kind in BOTH for layer in layers]
        remove_best([block for block in whole if block not in removed])
    for kind, end in ((Kind.MLP, 0.44 + 0.52), (Kind.MHA, 1.0)):
        left = {layer: groups[kind] for layer in layers if Block(kind, layer) not in removed}
        while gone() < end * ratio:
            remove_best([Block(kind, layer, number) for layer, number in left.items() if number > 1])
            left[removed[-1].layer] -= 1
    return removed


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_order_is_that_of_three_plain_loops_over_physically_narrower_models(seed: int) -> None:
    model = tiny_llama(seed=seed, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    windows, order = Windows(random_windows(num_windows=2), 2), by_weights(model)
    options = {"units": "all", "strategy": "multipruner", "threads_per_replica": 1}
    found = bp.search(model, windows, ratio=0.3, **options)
    assert found.order == plain_multipruner(model, windows.tokens, 0.3, order)
    assert found.channels is not None
    assert found.channels.digest == order.digest
    assert found.summary["channels"]["num_tokens"] == 0
    whole = [block for block in found.order if block.part is None]
    assert whole == found.order[: len(whole)]
    assert {block.kind for block in found.order[len(whole) :]} == set(BOTH)
    assert math.log(found.steps[-1]["perplexity"]) == pytest.approx(
        plain_score(model, found.mask, windows.tokens, order).value, rel=1e-10
    )
    small = bp.prune(model, found)
    assert 1 - small.num_parameters() / model.num_parameters() == pytest.approx(found.steps[-1]["ratio"], abs=1e-12)


class AtRandom:
    """An oracle that draws losses."""

    groups = (range(1),)
    num_scored = 0

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self.dense = Score(Mask(), (0.0,), 1)

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        self.num_scored += len(masks)
        return [Score(mask, (float(loss),), 1) for mask, loss in zip(masks, self._draw.random(len(masks)), strict=True)]

    def removed(self, step: Step) -> Score:
        return step.score

    def judged(self, judged: Round) -> None:
        raise AssertionError


SHAPE = Decoder(
    tiny_llama(num_hidden_layers=6, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
).shape


def searched(ratio: float, seed: int = 0, **options: Any) -> Found:
    space = SearchSpace(
        shape=SHAPE, blocks=Granularity.MIX, units=Units.ALL, budget=Budget(ratio=ratio), **options
    )  # fmt: skip
    strategy = MultiPruner()
    strategy.check(space)
    return strategy.run(space, AtRandom(seed))


@settings(max_examples=60)
@given(ratio=st.floats(0.02, 0.4), seed=st.integers(0, 999))
def test_each_stage_ends_with_the_first_removal_that_reaches_its_share(ratio: float, seed: int) -> None:
    found = searched(ratio, seed)
    gone = [0.0, *(SHAPE.ratio(Mask.of(found.blocks[: number + 1])) for number in range(len(found.blocks)))]
    assert gone[-1] >= ratio > gone[-2]
    for block, before in zip(found.blocks, gone, strict=False):
        if before < 0.44 * ratio:
            assert block.part is None
        else:
            assert block.part is not None
            assert block.kind is (Kind.MLP if before < 0.96 * ratio else Kind.MHA)


def test_the_work_that_is_left_counts_the_candidates_of_each_stage() -> None:
    shape = Decoder(tiny_llama(num_hidden_layers=20, intermediate_size=192)).shape
    space = SearchSpace(shape=shape, blocks=Granularity.MIX, units=Units.ALL, budget=Budget(ratio=0.25))
    forward, num_scored = shape.forward_flops(Mask(), 16), list[int]()
    expected = MultiPruner().flops_left(space, Mask(), 16)
    for seed in range(4):
        oracle = AtRandom(seed)
        found = MultiPruner().run(space, oracle)
        num_scored.append(oracle.num_scored)
        half = Mask.of(found.blocks[: len(found.blocks) // 2])
        assert 0.1 < MultiPruner().flops_left(space, half, 16) / expected < 0.6
        assert MultiPruner().flops_left(space, Mask.of(found.blocks), 16) == 0
    assert expected / (fmean(num_scored) * forward / 2) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("limits", "whole"), [({"max_mha": 1, "max_mlp": 1}, 2), ({"max_mha": 0, "max_mlp": 0}, 0)])
def test_a_stage_in_which_limits_leave_nothing_leaves_its_share_to_the_next(limits: dict[str, int], whole: int) -> None:
    found = searched(0.5, **limits)
    assert SHAPE.ratio(Mask.of(found.blocks)) >= 0.5
    assert [block.part is None for block in found.blocks].count(True) == whole
    with pytest.raises(UserError, match=r"expected `ratio` of at most .* got 0\.9"):
        searched(0.9, **limits)


def test_a_ratio_that_leaves_no_heads_to_remove_fails_in_one_line() -> None:
    with pytest.raises(SearchFailed, match=r"no channels or heads are left .* of `ratio` 0\.\d+; use a smaller one"):
        searched(0.85)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral sliding", "gemma3", "phi3", "gpt2"])
def test_rows_of_weights_are_added_over_the_layers_that_compute_a_channel(name: str) -> None:
    model = ROWS[name].model()
    replica = NarrowingReplica(Decoder(model), random_windows(num_windows=1) % 120, (Kind.MLP,), PPL)
    found = channel_order(LocalScorer(replica), 1, 1.0, (Kind.MLP,), OrderedBy.WEIGHTS)
    for block in found.blocks:
        weights = {key.split(".")[-2]: value for key, value in layer_of(model, block.layer).state_dict().items()
                   if ".mlp." in f".{key}" and key.endswith("weight")}  # fmt: skip
        if name == "gpt2":
            norm = np.abs(weights["c_fc"].numpy()).sum(0)
        elif name == "phi3":
            norm = np.abs(weights["gate_up_proj"].numpy()).sum(1).reshape(2, -1).sum(0)
        else:
            norm = sum(np.abs(weights[key].numpy()).sum(1) for key in ("gate_proj", "up_proj"))
        assert list(found.channels[block]) == list(np.argsort(-norm, kind="stable"))


def layer_of(model: PreTrainedModel, number: int) -> torch.nn.Module:
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    return layers[number]  # type: ignore[no-any-return]


@pytest.mark.slow
def test_two_replicas_give_the_bits_of_one(
    trained_folder: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    words = [
        sys.executable, "-m", "blockpruner", "search", str(trained_folder), "--calibration", str(text_file),
        "--num-samples", "20", "--seq-len", "16", "--dtype", "float32", "--threads-per-replica", "1", "--strategy",
        "multipruner", "--units", "all", "--ratio", "0.3", "--replicas", "2", "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    finish(words)
    given = {"model": str(trained_folder), "calibration": str(text_file), **OPTIONS}
    run_search(SearchConfig.of(**given, units="all", strategy="multipruner", ratio=0.3), tmp_path / "one", reporter)
    ledgers = [read_history(tmp_path / name / "ledger.jsonl") for name in ("one", "two")]
    one, two = ([each.all(ChannelsRecord)[0].digest, *units_and_steps(each)] for each in ledgers)
    assert one == two


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "six", num_hidden_layers=6, num_key_value_heads=4)


@pytest.fixture
def config(model_folder: Path, text_file: Path) -> CompareConfig:
    return compare_config(model_folder, text_file, methods=("multipruner", "shortgpt"), ratio=(0.15, 0.3))


@pytest.mark.usefixtures("one_process")
def test_it_is_compared_with_a_search_of_its_own_for_each_ratio(
    config: CompareConfig, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def measure(asked: LatencyConfig, *args: Any) -> dict[str, Any]:
        timed.append(load(asked.model).num_parameters())
        speeds = {"decode_tokens_per_s": 10.0, "generate_128_s": 1.0}
        return dict.fromkeys(("dense", "pruned", "ratio"), speeds) | {"setting": {"repeats": asked.repeats}}

    monkeypatch.setattr(comparing, "measure_latency", measure)
    monkeypatch.setattr(comparing, "Workload", lambda: Workload(prompt_len=6, num_tokens=4))
    rows = compare_methods(config.replace(repeats=1), tmp_path / "out", reporter)["rows"]
    _, *mine, ranked, _ = rows
    dense, tokenizer = bp.load(config.model, dtype="float32")
    text = bp.test_text(config.perplexity[0], tokenizer, seq_len=16, num_windows=4)
    for row, ratio, num_parameters in zip(mine, config.ratio, timed, strict=False):
        folder = tmp_path / "out" / "methods" / f"multipruner-{ratio}"
        alone = bp.search(
            config.model, config.calibration, out=tmp_path / f"{ratio}", num_samples=20, seq_len=16, num_windows=3,
            dtype="float32", no_ray=True, threads_per_replica=1, strategy="multipruner", units="all", ratio=ratio,
        )  # fmt: skip
        number = min(range(1, len(alone.steps) + 1), key=lambda k: abs(alone.steps[k - 1]["ratio"] - ratio))
        assert (row["method"], row["target"]) == ("multipruner", ratio)
        assert row["mask"] == str(Mask.of(alone.order[:number]))
        assert "/" in row["mask"]
        small = bp.prune(dense, folder / "sequence.json", num_remove=number)
        assert row["perplexity"] == pytest.approx(bp.perplexity(small, text), rel=1e-6)
        assert 1 - small.num_parameters() / dense.num_parameters() == pytest.approx(row["ratio"])
        assert num_parameters == small.num_parameters()
        assert not (folder / "checkpoint").exists()
    assert ranked["perplexity"] > 1
    monkeypatch.setattr(comparing, "run_method", None)
    assert compare_methods(config.replace(repeats=1), tmp_path / "out", reporter)["rows"] == rows


def test_a_model_that_can_only_lose_whole_attentions_is_refused_before_anything_runs(
    config: CompareConfig, tmp_path: Path, reporter: Reporter
) -> None:
    ROWS["gpt2"].model().float().save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    other = config.replace(model=str(tmp_path / "gpt2"))
    message = "method multipruner: expected a model whose attentions can lose KV heads for MultiPruner, got one whose"
    with pytest.raises(UserError, match=message):
        compare_methods(other, tmp_path / "out", reporter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.2}, "expected `units=all` with `strategy=multipruner`, got `units=blocks`"),
        ({"ratio": 0.2, "units": "all", "blocks": "mlp"}, "expected `blocks=mix` with `strategy=multipruner`"),
        ({"num_remove": 2, "units": "all"}, "expected `ratio` with `strategy=multipruner`"),
        ({"ratio": 0.2, "units": "all", "per": "params"}, "expected `per` with"),
        ({"ratio": 0.99, "units": "all"}, r"expected `ratio` of at most 0\.\d+"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_folder: Path, text_file: Path, tmp_path: Path, reporter: Reporter, options: dict[str, Any], message: str
) -> None:
    given = {"model": str(tiny_folder), "calibration": str(text_file), **OPTIONS, "strategy": "multipruner"}
    with pytest.raises(UserError, match=message):
        run_search(SearchConfig.of(**{**given, **options}), tmp_path / "run", reporter)
