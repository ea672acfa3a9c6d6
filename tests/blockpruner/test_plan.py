"""Plans from the config alone."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import GPTNeoXJapaneseConfig, LlamaConfig, PreTrainedConfig
from typer.testing import CliRunner

from blockpruner.cli import app
from blockpruner.engine.errors import UserError
from blockpruner.engine.model import rehearsal
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.known_models import known_config
from blockpruner.engine.model.loading import meta_from_config
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.units import KernelShape, sweep_bytes
from blockpruner.planning.config import Gpus
from blockpruner.showing.console import Reporter
from tests import calls
from tests.conftest import TINY
from tests.engine.architectures import ROWS
from tests.remote_code import write_remote_code_model

REPORTER = Reporter(Console(quiet=True))


def plan(model: str, gpus: str | None, **options: object) -> dict:
    return calls.plan(REPORTER, **{"model": model, "gpus": gpus, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "gpus", "placement", "num_replicas"),
    [
        ("llama-2-7b", "2x24GB", "resident", 2),
        ("llama-2-13b", "2x24GB", "streamed", 2),
        pytest.param("llama-2-70b", "1x24GB", "streamed", 1, marks=pytest.mark.slow),
        ("llama-2-70b", "8x80GB", "streamed", 8),
        ("llama-2-7b", "80GB", "resident", 1),
    ],
)
def test_the_placement_follows_from_the_memory(model: str, gpus: str, placement: str, num_replicas: int) -> None:
    found = plan(model, gpus)
    assert (found["placement"], found["num_replicas"]) == (placement, num_replicas)
    gigabytes = float(gpus.rpartition("x")[2].removesuffix("GB"))
    assert found["memory_per_device_bytes"] < 0.95 * gigabytes * 1e9


def test_a_sharded_model_takes_several_gpus_of_one_node() -> None:
    found = plan("llama-2-70b", "8x80GB", placement="sharded", nodes=2)
    assert (found["placement"], found["gpus_per_replica"], found["num_replicas"]) == ("sharded", 2, 8)


@pytest.mark.slow
def test_a_model_is_sharded_over_as_many_gpus_as_asked() -> None:
    found = plan("llama-2-70b", "8x80GB", gpus_per_replica=4, nodes=2)
    assert (found["placement"], found["gpus_per_replica"], found["num_replicas"]) == ("sharded", 4, 4)


def test_work_is_about_half_of_the_plain_loops_and_time_follows_the_rate_and_the_replicas() -> None:
    slow, fast = plan("llama-2-7b", "1x24GB", tflops=50.0), plan("llama-2-7b", "1x24GB", tflops=100.0)
    greedy, loop = (slow["strategies"][name] for name in ("greedy", "plain loop"))
    assert 0.45 < greedy["work_flops"] / loop["work_flops"] < 0.6
    assert greedy["forecast_s"] == pytest.approx(greedy["work_flops"] / 50e12)
    assert fast["strategies"]["greedy"]["forecast_s"] == pytest.approx(greedy["forecast_s"] / 2)
    two = plan("llama-2-7b", "2x24GB", tflops=50.0, num_windows=64)["strategies"]["greedy"]
    one = plan("llama-2-7b", "1x24GB", tflops=50.0, num_windows=64)["strategies"]["greedy"]
    assert one["forecast_s"] / two["forecast_s"] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(("options", "is_told"), [
    ({"num_remove": 12}, "this is its saving on SmolLM2."),
    ({"num_remove": 12, "units": "channels"}, "its saving on SmolLM2 of channels."),
    ({"num_remove": 2, "units": "channels"}, "There is no time of lazy"),
    ({"num_remove": 2, "blocks": "layer"}, "its saving on SmolLM2 with --blocks layer."),
    ({"num_remove": 1, "blocks": "layer"}, "There is no time of lazy"),
    ({"num_remove": 12, "blocks": "mha"}, "its saving on SmolLM2 with --blocks mha."),
])  # fmt: skip
def test_what_is_said_of_lazy_goes_with_its_row(
    options: dict[str, object], is_told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(Console(width=300))
    found = calls.plan(reporter, model="llama-2-7b", gpus="1x24GB", num_windows=1, seq_len=128, **options)
    told = capsys.readouterr().out
    assert is_told in told
    assert ("lazy" in found["strategies"]) is ("The saving of lazy" in told)


def test_refits_of_a_search_are_in_its_forecast_and_their_windows_are_not_scored() -> None:
    given = {"model": "llama-2-7b", "gpus": "1x24GB", "tflops": 50.0, "num_remove": 16}
    plain = plan(**given, num_windows=8)
    found = plan(**given, num_windows=24, compensate=True, compensate_every=4, compensate_windows=16)
    one = plan(**given, num_windows=16)["compensation"]
    assert one["forecast_s"] == pytest.approx(one["work_flops"] / 50e12)
    for name, cost in found["strategies"].items():
        before = plain["strategies"][name]["work_flops"]
        assert cost["work_flops"] == pytest.approx(before + 4 * one["work_flops"], rel=1e-3)


def test_a_streamed_sweep_takes_at_least_its_copy() -> None:
    """With one short window the copy cannot hide."""
    found = plan("llama-2-13b", "1x24GB", seq_len=128, num_windows=1, num_remove=1, tflops=1000.0)
    assert found["strategies"]["greedy"]["forecast_s"] == pytest.approx(found["weights_bytes"] / 20e9)


@pytest.mark.parametrize(
    ("model", "gpus", "options", "message"),
    [
        ("llama-2-7b", "two", {}, "expected `gpus` like 2x24GB"),
        ("llama-2-7b", "00x24GB", {}, "expected `gpus` like 2x24GB"),
        ("llama-2-7b", "2x24GB", {"seq_len": 8192}, "`seq_len` of at most 4096"),
        ("llama-2-7b", "2x24GB", {"placement": "streamed", "gpus_per_replica": 2}, "only a sharded model"),
        ("llama-2-7b", None, {"gpus_per_replica": 2, "tflops": 1.0}, "this is a run on CPUs"),
        ("llama-2-70b", "1x4GB", {}, "a streamed one needs"),
        ("llama-2-70b", "2x24GB", {"placement": "resident"}, "`placement=streamed` would fit"),
        ("llama-2-70b", "2x24GB", {"gpus_per_replica": 2}, "`placement=streamed` would fit"),
        ("llama-2-7b", "2x24GB", {"replicas": 3}, "at most 2 replicas"),
        ("llama-2-7b", "2x24GB", {"gpus_per_replica": 4}, "`gpus_per_replica` of at most 2"),
        ("no/such/model", "2x24GB", {}, r"Built-in shapes: llama-2-7b, "),
        ("llama-2-7b", "2x24GB", {"num_remove": 64}, "`num_remove` from 1 to 63"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(
    model: str, gpus: str | None, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(model, gpus, **options)


def test_memory_is_read_in_decimal_and_in_binary_units() -> None:
    assert Gpus.parse("2x24GB", 1) == Gpus(2, 24 * 10**9, 1)
    assert Gpus.parse("8 x 80GiB", 3) == Gpus(8, 80 * 2**30, 3)


def test_the_command_measures_a_local_model_here_and_ends_with_json(tiny_folder: Path) -> None:
    options = ["--seq-len", "16", "--num-windows", "3", "--num-remove", "2", "--dtype", "float32", "--json"]
    done = CliRunner().invoke(app, ["plan", str(tiny_folder), *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["placement"] == "resident"
    assert found["strategies"]["greedy"]["num_candidates"] == 8 + 7
    assert found["strategies"]["greedy"]["forecast_s"] > 0
    assert "measured here on cpu" in found["rate"]["reason"]


def test_the_memory_is_that_of_the_sweep_that_is_named() -> None:
    found = plan("llama-2-7b", "2x24GB")
    config = known_config("llama-2-7b")
    assert config is not None
    shape = Decoder(meta_from_config(config, "bfloat16", ModelSource("llama-2-7b"))).shape
    sweep = sweep_bytes(shape, KernelShape(**found["kernel"]), seq_len=2048, bytes_per_value=2)
    assert found["kernel"]["masks"] == 64
    assert found["memory_per_device_bytes"] == found["weights_bytes"] + sweep


MACHINES = [["--gpus", "2x24GB"], ["--tflops", "1"], ["--gpus", "24GB", "--tflops", "1"], []]


def config_folder(config: PreTrainedConfig, folder: Path) -> Path:
    """A model of which only the config is there."""
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("machines", MACHINES)
def test_what_a_search_refuses_gets_no_forecast(machines: list[str], tmp_path: Path) -> None:
    folder = config_folder(GPTNeoXJapaneseConfig(**TINY), tmp_path / "model")
    done = CliRunner().invoke(app, ["plan", str(folder), "--seq-len", "16", *machines])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "'gpt_neox_japanese' is not supported yet: 'attention' of its layer 3 returns weights" in done.stderr
    assert "PFLOP" not in done.output


def test_units_that_a_search_refuses_get_no_forecast(tmp_path: Path) -> None:
    folder = config_folder(ROWS["stablelm"].make_config(), tmp_path / "model")
    options = ["plan", str(folder), "--seq-len", "16", "--tflops", "1", "--num-remove", "2", "--units"]
    refused = CliRunner().invoke(app, [*options, "all"])
    assert refused.exit_code == 2
    assert "parts of blocks cannot be removed from model type 'stablelm'" in refused.stderr
    assert "use --units channels or --units blocks" in refused.stderr
    assert CliRunner().invoke(app, [*options, "channels"]).exit_code == 0


@pytest.mark.parametrize("row", ["gemma3", "qwen3_moe"])
def test_layers_of_two_kinds_and_experts_are_planned(row: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = ROWS[row].make_config()
    found = calls.plan(
        Reporter(Console(width=200)), model=str(config_folder(config, tmp_path / "model")), seq_len=16, gpus="24GB"
    )
    assert found["num_blocks"] == 8
    assert "note:" not in capsys.readouterr().out


def test_a_plan_says_that_a_model_was_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(rehearsal, "LARGEST_BYTES", 2**10)
    folder = config_folder(LlamaConfig(**TINY), tmp_path / "large")
    found = calls.plan(Reporter(Console(width=200)), model=str(folder), seq_len=16, gpus="24GB")
    assert found["strategies"]
    told = " ".join(capsys.readouterr().out.split())
    assert "could not be tried on a copy of a few layers (MemoryError: a copy needs" in told


def test_the_speed_of_a_model_with_its_own_code_is_measured_once_it_is_trusted(tmp_path: Path) -> None:
    write_remote_code_model(tmp_path / "tinychuan")
    options = {"seq_len": 16, "num_windows": 1, "num_remove": 1, "dtype": "float32", "trust_remote_code": True}
    found = plan(str(tmp_path / "tinychuan"), None, **options)
    assert "measured here on cpu" in found["rate"]["reason"]
