"""Several methods on one model: each as near to the ratio as it gets, judged alike, and nothing done twice."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from blockpruner.comparing import comparing
from blockpruner.comparing.comparing import compare_methods
from blockpruner.comparing.config import CompareConfig
from blockpruner.comparing.method import Method
from blockpruner.comparing.ranked import Ranked
from blockpruner.comparing.searched import Searched
from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.errors import NotFinite, SearchFailed, UserError
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_model
from blockpruner.engine.scoring.reference import plain_score
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.strategies.lazy import Lazy
from blockpruner.engine.strategies.multipruner import MultiPruner
from blockpruner.engine.strategies.one_shot import OneShot
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.searching.driver import run_search
from blockpruner.searching.resolving import prepare
from blockpruner.searching.sequence import read_official_sequence
from blockpruner.showing.console import Reporter
from blockpruner.timing.config import LatencyConfig
from tests.calls import compare_config
from tests.conftest import tiny_tokenizer, write_tiny

REBUILDING = ("laco", "slicegpt", "replaceme", "prune-and-comp")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, so that ratios lie close together."""
    return write_tiny(tmp_path_factory.mktemp("models") / "six", num_hidden_layers=6)


@pytest.fixture
def config(model_folder: Path, text_file: Path) -> CompareConfig:
    return compare_config(model_folder, text_file, methods=("shortgpt", "blockpruner"), ratio=(0.2, 0.4))


class TestComparison:
    def test_rows_are_what_each_method_gives_alone(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        found = compare_methods(config, tmp_path / "out", reporter)
        rows = {(row["method"], row["target"]): row for row in found["rows"]}
        assert list(rows) == [("dense", None), *((m, r) for m in config.methods for r in config.ratio)]

        greedy = run_search(config.told("blockpruner", 6), tmp_path / "run", reporter)
        for ratio in config.ratio:
            steps = greedy["steps"]
            number = min(range(1, len(steps) + 1), key=lambda k: abs(steps[k - 1]["ratio"] - ratio))
            row = rows["blockpruner", ratio]
            assert row["ratio"] == steps[number - 1]["ratio"]
            assert row["work_flops"] == sum(step["work_flops"] for step in steps[:number])
            alone = EvaluationConfig(
                model=config.model, run=tmp_path / "run", num_remove=(number,), perplexity=config.perplexity,
                seq_len=(16,), num_windows=4, dtype="float32", no_ray=True, threads_per_replica=1,
            )  # fmt: skip
            value = evaluate_model(alone, reporter)["perplexity"][config.perplexity[0]]["value"]
            assert row["perplexity"] == value
            assert row["average"] is None
            assert row["decode_tokens_per_s"] is None
        layers = read_official_sequence(tmp_path / "out" / "methods" / "shortgpt" / "sequence.json")
        mask = Mask.parse(rows["shortgpt", 0.4]["mask"])
        assert mask == Mask.of(layers[: len(mask.absent)])
        assert all(Block(Kind.MLP, block.layer) in mask.absent for block in mask.absent)
        for row in found["rows"][1:]:
            assert row["pruning_s"] == pytest.approx(row["startup_s"] + row["load_s"] + row["search_s"])
            assert row["peak_memory_bytes"] > 2**26
            assert row["work_flops"] > 0

        with (tmp_path / "out" / "comparison.csv").open() as stream:
            table = list(csv.DictReader(stream))
        values = [row["perplexity"] for row in found["rows"]]
        assert [float(line["perplexity"]) for line in table] == values
        assert [float(line[config.perplexity[0]]) for line in table] == values
        written = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert written["rows"] == found["rows"]
        assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"

    @pytest.mark.usefixtures("one_process")
    def test_what_is_there_is_not_done_again(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = compare_methods(config.replace(methods=("shortgpt",)), tmp_path, reporter)
        asked: list[Any] = []
        real = comparing.run_method

        def counted(name: str, *args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(comparing, "run_method", counted)
        second = compare_methods(config.replace(methods=("shortgpt", "rm")), tmp_path, reporter)
        assert asked == ["rm"]
        assert [row for row in second["rows"] if row["method"] != "rm"] == first["rows"]

    @pytest.mark.usefixtures("one_process")
    def test_methods_that_rebuild_the_model_are_judged_by_their_checkpoints(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        found = compare_methods(config.replace(methods=REBUILDING, ratio=(0.25,)), tmp_path, reporter)
        for row in found["rows"][1:]:
            folder = tmp_path / "methods" / f"{row['method']}-0.25" / "checkpoint"
            model = load_model(ModelSource(str(folder)), "float32")
            dense = load_model(ModelSource(config.model), "float32")
            assert row["ratio"] == pytest.approx(1 - model.num_parameters() / dense.num_parameters())
            assert row["mask"] is None
            assert row["perplexity"] > 1

    @pytest.mark.usefixtures("one_process")
    def test_generation_is_timed_beside_the_dense_model_and_its_checkpoint_goes(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured = []

        def measure(timed: LatencyConfig, *args: Any) -> dict[str, Any]:
            measured.append(load_model(ModelSource(timed.model), "float32").num_parameters())
            speeds = {"decode_tokens_per_s": 10.0, "generate_128_s": 1.0}
            return {
                "dense": speeds, "pruned": {**speeds, "decode_tokens_per_s": 15.0},
                "ratio": {"decode_tokens_per_s": 1.5, "generate_128_s": 0.8}, "setting": {"repeats": timed.repeats},
            }  # fmt: skip

        monkeypatch.setattr(comparing, "measure_latency", measure)
        real_config = comparing.LatencyConfig
        monkeypatch.setattr(comparing, "Workload", lambda: Workload(prompt_len=6, num_tokens=4))
        monkeypatch.setattr(
            comparing, "LatencyConfig", lambda **given: real_config(**given, prompt_len=6, num_tokens=4)
        )
        one = config.replace(methods=("shortgpt",), ratio=(0.3,), repeats=2)
        rows = compare_methods(one, tmp_path, reporter)["rows"]
        assert [row["decode_tokens_per_s"] for row in rows] == [10.0, 15.0]
        assert rows[1]["decode_ratio"] == 1.5
        dense = load_model(ModelSource(config.model), "float32").num_parameters()
        assert measured == [round(dense * (1 - rows[1]["ratio"]))]
        assert not (tmp_path / "methods" / "shortgpt" / "checkpoint").exists()
        compare_methods(one, tmp_path, reporter)
        assert len(measured) == 1


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["blockpruner", "one-shot", "shortgpt"])
def test_ratios_may_be_added_in_any_order(config: CompareConfig, tmp_path: Path, reporter: Reporter, name: str) -> None:
    config = config.replace(methods=(name,), perplexity=(), test_windows=None)

    def masks(out: Path, *ratios: float) -> dict[float, str]:
        rows = compare_methods(config.replace(ratio=ratios), out, reporter)["rows"]
        return {row["target"]: row["mask"] for row in rows[1:]}

    at_once = masks(tmp_path / "at once", 0.2, 0.4)
    grown = [masks(tmp_path / "grown", *ratios) for ratios in ((0.2,), (0.4, 0.2), (0.2,))]
    assert grown == [{0.2: at_once[0.2]}, at_once, {0.2: at_once[0.2]}]


@pytest.mark.usefixtures("one_process")
def test_a_search_that_goes_further_later_keeps_the_times_that_are_known(
    config: CompareConfig, tmp_path: Path, reporter: Reporter
) -> None:
    config = config.replace(methods=("blockpruner",), perplexity=(), test_windows=None)
    first = compare_methods(config.replace(ratio=(0.2,)), tmp_path, reporter)["rows"][1]
    again, further = compare_methods(config.replace(ratio=(0.2, 0.4)), tmp_path, reporter)["rows"][1:]
    assert again == first
    assert first["pruning_s"] is not None
    assert further["startup_s"] == first["startup_s"]
    assert further["search_s"] > first["search_s"]
    assert further["work_flops"] > first["work_flops"]


@pytest.mark.usefixtures("one_process")
def test_a_model_that_cannot_be_judged_leaves_the_others_their_rows(
    config: CompareConfig, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparing._evaluate

    def evaluate(judge: EvaluationConfig, out: Path, masks: tuple[Mask, ...] = ()) -> dict[str, Any]:
        if judge.model.endswith("checkpoint"):
            raise failure
        found = real(judge, out, masks)
        tasks = {"made up": {"acc": 0.5, "score": 0.5, "stderr": 0.1, "metrics": {"acc": 0.5}}}
        return {**found, "rows": [{**row, "tasks": tasks} for row in found["rows"]]}

    monkeypatch.setattr(comparing, "_evaluate", evaluate)
    config = config.replace(methods=("laco", "shortgpt"), ratio=(0.25,))
    failure: SearchFailed = SearchFailed("the memory was full")
    with pytest.raises(SearchFailed, match="memory"):  # that says nothing about the model
        compare_methods(config, tmp_path, reporter)
    failure = NotFinite("the model's likelihoods are not finite")
    found = compare_methods(config, tmp_path, reporter)
    _, merged, ranked = found["rows"]
    assert merged["tasks"]["made up"] == {"acc": None, "acc_norm": None, "score": None, "stderr": None, "metrics": {}}
    assert (merged["perplexity"], merged["average"]) == (None, None)
    assert merged["ratio"] > 0
    assert ranked["perplexity"] > 1
    with (tmp_path / "comparison.csv").open() as stream:
        assert [line["perplexity"] for line in csv.DictReader(stream)][1] == ""


@pytest.mark.usefixtures("one_process")
def test_a_search_that_an_earlier_session_began_has_no_time_of_its_own(
    config: CompareConfig, model_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    config = config.replace(methods=("blockpruner",), perplexity=(), test_windows=None)
    before = config.told("blockpruner", 6).replace(ratio=0.4)
    compare_methods(config.replace(methods=("shortgpt",), ratio=(0.2,)), tmp_path, reporter)
    run_search(before, tmp_path / "methods" / "blockpruner" / "run", reporter)
    row = compare_methods(config.replace(ratio=(0.2,)), tmp_path, reporter)["rows"][1]
    assert (row["pruning_s"], row["startup_s"], row["peak_memory_bytes"]) == (None, None, None)
    assert row["ratio"] == pytest.approx(0.2, abs=0.06)


def test_every_method_has_a_space_of_its_own_kind(config: CompareConfig, model_folder: Path) -> None:
    shape = Decoder(load_model(ModelSource(str(model_folder)), "float32")).shape
    lazy = config.replace(strategy=Lazy(tolerance="1se"))
    for name, kind in Method.all().items():
        method = kind()
        for given in (config, lazy):
            told = given.told(name, 6)
            if isinstance(method, Searched):
                own = {"one-shot": OneShot(), "shortened-llama": OneShot(), "multipruner": MultiPruner()}
                assert told.strategy == own.get(name, given.strategy)
            if not method.rebuilds:
                assert told.ratio == max(config.ratio)
                told.space(shape)
            if isinstance(method, Ranked):
                assert told.blocks is method.blocks
    sleb = config.told("sleb", 6).space(shape)
    assert {candidate.block.layer for candidate in sleb.neighbours(Mask())} == {1, 2, 3, 4}


def test_sleb_removes_what_a_plain_loop_over_all_layers_but_the_ends_removes(
    config: CompareConfig, tmp_path: Path, reporter: Reporter
) -> None:
    model = load_model(ModelSource(config.model), "float32")
    search = config.told("sleb", 6).replace(ratio=None, num_remove=3)
    found = run_search(search, tmp_path / "run", reporter)
    windows = prepare(search, reporter).windows.tokens
    alive, mask, expected = [1, 2, 3, 4], Mask(), []
    for _ in range(3):
        masks = {layer: mask.without(Block(Kind.LAYER, layer)) for layer in alive}
        layer = min(alive, key=lambda layer: sum(plain_score(model, masks[layer], windows).window_sums))
        alive.remove(layer)
        mask = masks[layer]
        expected.append(["layer", layer])
    assert [step["block"] for step in found["steps"]] == expected


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"methods": ("blockpruner", "shortgtp")}, "expected `methods` to be bi-blocks, .*, got 'shortgtp'"),
            ({"methods": ()}, "at least one"),
            ({"ratio": (1.5,)}, "expected `ratio` between 0 and 1"),
            ({"ratio": (0.2, 0.2)}, "without repetitions"),
            ({"repeats": -1}, "expected `repeats` of at least 0"),
            ({"test_windows": 0}, "expected `test_windows` of at least 1"),
            ({"perplexity": (), "test_windows": None, "limit": 3}, "`limit` together with `tasks`"),
            ({"perplexity": (), "tasks": ("piqa",)}, "`test_windows` together with `perplexity`"),
        ],
    )
    def test_options_are_checked_at_once(self, config: CompareConfig, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            config.replace(**options)

    def test_a_generation_longer_than_the_models_positions_is_refused_before_any_method_runs(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        with pytest.raises(UserError, match=r"together of at most 128.*`repeats=0`"):
            compare_methods(config.replace(repeats=1), tmp_path / "out", reporter)
        with pytest.raises(UserError, match="expected `test_seq_len` of at most 128"):
            compare_methods(config.replace(test_seq_len=129), tmp_path / "out", reporter)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["shortgpt", "blockpruner", *REBUILDING])
    def test_a_ratio_that_a_method_cannot_reach_is_refused_with_the_largest_one(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter, name: str
    ) -> None:
        with pytest.raises(UserError, match=rf"method {name}: expected `ratio` of at most 0\.\d+.*, got 0\.99"):
            compare_methods(config.replace(methods=(name,), ratio=(0.99,)), tmp_path / "out", reporter)
        assert not (tmp_path / "out").exists()

    def test_a_method_that_does_not_fit_the_architecture_is_refused_by_name(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        from tests.engine.architectures import ROWS

        ROWS["gpt2"].model().float().save_pretrained(tmp_path / "gpt2")
        tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
        other = config.replace(methods=("slicegpt",), model=str(tmp_path / "gpt2"))
        with pytest.raises(UserError, match=r"method slicegpt: .*'gpt2'"):
            compare_methods(other, tmp_path / "out", reporter)

    @pytest.mark.usefixtures("one_process")
    def test_a_comparison_that_failed_before_its_first_method_leaves_room_for_another(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        config = config.replace(methods=("shortgpt",), perplexity=(), test_windows=None)
        with pytest.raises(UserError, match="does not exist"):
            missing = config.replace(calibration="nowhere.txt")
            compare_methods(missing, tmp_path / "out", reporter)
        assert compare_methods(config, tmp_path / "out", reporter)["rows"]

    @pytest.mark.usefixtures("one_process")
    def test_another_text_under_the_same_name_is_refused(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        text = tmp_path / "rows.txt"
        text.write_text(Path(config.calibration[0]).read_text())
        config = config.replace(methods=("shortgpt",), perplexity=(), test_windows=None, calibration=str(text))
        compare_methods(config, tmp_path / "out", reporter)
        text.write_text("another text\n" * 200)
        with pytest.raises(UserError, match="another config: `windows` was"):
            compare_methods(config, tmp_path / "out", reporter)

    @pytest.mark.usefixtures("one_process")
    def test_a_wrong_text_to_judge_by_is_refused_before_any_method_runs(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        with pytest.raises(UserError, match=r"'nowhere\.txt', which does not exist"):
            compare_methods(config.replace(perplexity=("nowhere.txt",)), tmp_path / "out", reporter)
        assert not (tmp_path / "out" / "methods").exists()

    def test_a_folder_of_another_comparison_is_refused(
        self, config: CompareConfig, tmp_path: Path, reporter: Reporter
    ) -> None:
        recorded = {**config.same_on_resume(), "dtype": "float32", "seed": 7, "weights": "a", "windows": "b"}
        (tmp_path / "compare.json").write_text(json.dumps(recorded))
        (tmp_path / "methods" / "rm").mkdir(parents=True)
        (tmp_path / "methods" / "rm" / "outcome.json").write_text("{}")
        with pytest.raises(UserError, match=r"another config: .*`seed` was 7, now 42"):
            compare_methods(config, tmp_path, reporter)
        (tmp_path / "compare.json").write_text(json.dumps({"seed": 42}))
        with pytest.raises(UserError, match="another version of blockpruner; choose another `out`"):
            compare_methods(config, tmp_path, reporter)
