"""The scorer's contract, in process and on Ray, and what happens when replicas die."""

import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blockpruner.cluster.metrics import COUNTED, SHOWN, RayMetrics
from blockpruner.cluster.nodes import Needs
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.scoring.probe import is_batch_invariant
from blockpruner.engine.scoring.scorer import LocalScorer, OutOfMemory, Scorer, UnitResult
from blockpruner.engine.scoring.scoring import ScoringSpec
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import KernelShape, split_work
from tests.cluster import fakes
from tests.conftest import load, random_windows

WINDOWS = random_windows(num_windows=4, seq_len=64)
KERNEL = KernelShape(rows=8, head_tokens=64, masks=4, windows=2, threads=1, batch_invariant=True)
MASKS = [Mask().without(block) for block in Granularity.MIX.candidates(4)]


def spec_of(folder: Path) -> ScoringSpec:
    return ScoringSpec(model=ModelSource(str(folder)), dtype="float32", device="cpu", threads=1)


@contextmanager
def local(folder: Path) -> Iterator[Scorer]:
    yield LocalScorer(spec_of(folder).open(WINDOWS))


@contextmanager
def on_ray(
    folder: Path, num_replicas: int, say: Callable[[str], None] = lambda text: None, **waits: float
) -> Iterator[Scorer]:
    from blockpruner.cluster.dispatch import Dispatcher
    from blockpruner.cluster.fleet import RayFleet

    needs = Needs(num_cpus=1, num_gpus=0)
    fleet = RayFleet(spec_of(folder), WINDOWS, needs, expected=None)
    with Dispatcher(fleet, needs, num_replicas, say, **{"patience_s": 240.0, **waits}) as scorer:
        yield scorer


def collect(results: Iterator[UnitResult | OutOfMemory]) -> dict[tuple[Mask, int], float]:
    return {
        (mask, window): value
        for result in results
        if isinstance(result, UnitResult)
        for mask, row in zip(result.unit.masks, result.value, strict=True)
        for window, value in zip(range(result.unit.first, result.unit.stop), row, strict=True)
    }


def shape_of(folder: Path) -> ModelShape:
    return Decoder(load(folder, "float32")).shape


def probe(scorer: Scorer, folder: Path) -> bool | OutOfMemory:
    return is_batch_invariant(scorer, shape_of(folder), KERNEL, num_windows=4, seq_len=64)


def score(scorer: Scorer, folder: Path) -> dict[tuple[Mask, int], float]:
    return collect(scorer.run(units(folder, scorer.num_replicas)))


def units(folder: Path, num_replicas: int) -> list:
    return split_work(MASKS, shape_of(folder), KERNEL, groups=[range(4)], seq_len=64, num_replicas=num_replicas)


@pytest.fixture
def expected(tiny_folder: Path) -> dict[tuple[Mask, int], float]:
    """Every mask alone, one window a sweep."""
    scorer = spec_of(tiny_folder).open(WINDOWS)
    alone = KernelShape(rows=1, head_tokens=64, masks=1, windows=1, threads=1)
    single = split_work(MASKS, shape_of(tiny_folder), alone, groups=[range(4)], seq_len=64, num_replicas=1)
    return {(unit.masks[0], unit.first): scorer.score(unit)[0][0][0] for unit in single}


def test_experts_share_tokens_so_a_score_is_taken_to_depend_on_its_company(tiny_folder: Path) -> None:
    shape = replace(shape_of(tiny_folder), routes_tokens=True)
    with local(tiny_folder) as scorer:
        assert is_batch_invariant(scorer, shape, KERNEL, num_windows=4, seq_len=64) is False


def test_windows_of_an_odd_length_are_taken_to_depend_on_their_company(tiny_folder: Path) -> None:
    scorer = LocalScorer(spec_of(tiny_folder).open(WINDOWS[:, :33]))
    assert is_batch_invariant(scorer, shape_of(tiny_folder), KERNEL, num_windows=4, seq_len=33) is False


@pytest.mark.parametrize("masks", [1, 2, 5])
def test_the_probe_puts_no_more_masks_in_a_sweep_than_any_other_unit(tiny_folder: Path, masks: int) -> None:
    asked: list[int] = []

    class Noting(LocalScorer):
        def run(self, units: Any) -> Any:
            asked.extend(len(unit.masks) for unit in units)
            return super().run(units)

    scorer = Noting(spec_of(tiny_folder).open(WINDOWS))
    kernel = replace(KERNEL, masks=masks)
    assert is_batch_invariant(scorer, shape_of(tiny_folder), kernel, num_windows=4, seq_len=64) is True
    assert max(asked) == masks


class TestContract:
    @pytest.fixture(params=["local", "ray"])
    def scorer(self, request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[Scorer]:
        if request.param == "local":
            with local(tiny_folder) as scorer:
                yield scorer
        else:
            request.getfixturevalue("local_ray")
            with on_ray(tiny_folder, 2) as scorer:
                yield scorer

    def test_every_mask_and_window_is_scored_to_the_same_bits(
        self, scorer: Scorer, tiny_folder: Path, expected: dict[tuple[Mask, int], float]
    ) -> None:
        assert score(scorer, tiny_folder) == expected

    def test_batch_invariance_is_found_out(self, scorer: Scorer, tiny_folder: Path) -> None:
        assert probe(scorer, tiny_folder) is True


@pytest.mark.usefixtures("local_ray")
class TestFaults:
    @pytest.mark.slow  # one process and two replicas give the same: TestContract
    def test_any_number_of_replicas_gives_the_same_bits(
        self, tiny_folder: Path, expected: dict[tuple[Mask, int], float]
    ) -> None:
        for num_replicas in (1, 3):
            with on_ray(tiny_folder, num_replicas) as scorer:
                assert score(scorer, tiny_folder) == expected

    def test_the_units_of_a_killed_replica_are_done_again(
        self, tiny_folder: Path, expected: dict[tuple[Mask, int], float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockpruner.cluster.fleet.ReplicaActor", fakes.SlowReplica)
        said: list[str] = []
        with on_ray(tiny_folder, 2, said.append) as scorer:
            results = scorer.run(units(tiny_folder, 4))
            first = next(results)
            pids = [int(match[1]) for text in said if (match := re.search(r"process (\d+)", text))]
            os.kill(pids[0], signal.SIGKILL)
            found = collect(results) | collect(iter([first]))
        assert found == expected
        assert any("; it is replaced" in text for text in said)

    @pytest.mark.slow  # decided by the dispatcher, whose tests need no Ray
    def test_a_unit_that_kills_every_replica_ends_the_run_and_is_named(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockpruner.cluster.fleet.ReplicaActor", fakes.PoisonedReplica)
        with (
            on_ray(tiny_folder, 2) as scorer,
            pytest.raises(SearchFailed, match=r"masks mha\.2 \.\.\. mlp\.3 killed 3 replicas"),
        ):
            score(scorer, tiny_folder)

    @pytest.mark.slow  # decided by the dispatcher, whose tests need no Ray
    def test_a_unit_that_hangs_is_given_up_and_done_again(
        self,
        tiny_folder: Path,
        tmp_path: Path,
        expected: dict[tuple[Mask, int], float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("blockpruner.cluster.fleet.ReplicaActor", fakes.hanging_once(tmp_path / "hung"))
        said: list[str] = []
        with on_ray(tiny_folder, 2, said.append, task_timeout_s=5.0) as scorer:
            assert score(scorer, tiny_folder) == expected
        assert any("no result within 5 s" in text for text in said)

    def test_a_replica_that_cannot_load_ends_the_run_with_its_own_message(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockpruner.cluster.fleet.ReplicaActor", fakes.UnloadableReplica)
        with on_ray(tiny_folder, 2) as scorer, pytest.raises(UserError, match="got a stone"):
            score(scorer, tiny_folder)

    @pytest.mark.slow  # decided by the dispatcher, whose tests need no Ray
    def test_replicas_that_die_while_loading_are_not_respawned_for_ever(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockpruner.cluster.fleet.ReplicaActor", fakes.DyingReplica)
        with on_ray(tiny_folder, 2) as scorer, pytest.raises(SearchFailed, match="3 replicas in a row died"):
            score(scorer, tiny_folder)

    def test_a_bug_in_scoring_is_raised_as_itself(self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("blockpruner.cluster.fleet.ReplicaActor", fakes.FaultyReplica)
        with on_ray(tiny_folder, 1) as scorer, pytest.raises(ZeroDivisionError, match="a bug in our code"):
            score(scorer, tiny_folder)

    @pytest.mark.slow  # a run that ends leaves no process: TestOnRay
    def test_leaving_the_scorer_kills_its_actors(self, tiny_folder: Path) -> None:
        said: list[str] = []
        with on_ray(tiny_folder, 1, said.append) as scorer:
            score(scorer, tiny_folder)
        pid = int(re.findall(r"process (\d+)", said[-1])[0])
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                return
            signal.sigtimedwait([], 0.1)
        pytest.fail(f"replica process {pid} is still alive")


def test_a_model_whose_scores_depend_on_their_company_is_found_out(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockpruner.engine.scoring.forked import ForkedPass

    window_sums = ForkedPass.window_sums

    def with_company(self: ForkedPass, masks: list[Mask], *args: Any) -> torch.Tensor:
        return window_sums(self, masks, *args) * (1 + 1e-15 * len(masks))

    with local(tiny_folder) as scorer:
        assert probe(scorer, tiny_folder) is True
        monkeypatch.setattr(ForkedPass, "window_sums", with_company)
        assert probe(scorer, tiny_folder) is False


@pytest.mark.parametrize("error", [UserError("expected x, got y."), SearchFailed("no candidate")])
def test_our_exceptions_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("run", ["run", "Läufe/1", "\udcff"])
def test_ray_takes_metrics_of_a_run_of_any_name(run: str) -> None:
    metrics = RayMetrics(run)
    for name in COUNTED:
        metrics.count(name)
    for name in SHOWN:
        metrics.show(name, 1)


@pytest.mark.usefixtures("local_ray")
def test_replicas_on_cpus_do_not_see_the_gpus(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockpruner.cluster import fleet

    monkeypatch.setattr(fleet, "ReplicaActor", fakes.WitnessingReplica)
    said: list[str] = []
    with on_ray(tiny_folder, 2, say=said.append) as scorer:
        score(scorer, tiny_folder)
    assert sum("is ready (CUDA_VISIBLE_DEVICES='')" in text for text in said) >= 1


@pytest.mark.usefixtures("local_ray")
class TestSurvey:
    def test_all_nodes_that_do_not_answer_are_named_after_one_deadline(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from blockpruner.cluster import fleet

        (here,) = fleet.cluster_nodes()
        gone = [replace(here, id=digit * 56, name=f"node-{digit}") for digit in "ab"]
        monkeypatch.setattr(fleet, "SURVEY_TIMEOUT_S", 60.0)
        with pytest.raises(UserError, match=r"2 of 3 nodes do not answer \(node-a: .*; node-b: ") as caught:
            fleet.survey_nodes([gone[0], here, gone[1]], ModelSource(str(tiny_folder)), "cpu")
        assert here.name not in str(caught.value)
        monkeypatch.setattr(fleet, "SURVEY_TIMEOUT_S", 0.01)
        with pytest.raises(UserError, match=r"1 of 1 nodes do not answer \(.*: no answer within 0 s\)"):
            fleet.survey_nodes([here], ModelSource(str(tiny_folder)), "cpu")
