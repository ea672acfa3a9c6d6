"""The search as a user runs it: one process, interrupted, killed, resumed, refused."""

import json
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.loading import load_tokenizer
from blockpruner.engine.scoring.forked import ForkedPass
from blockpruner.engine.scoring.reference import plain_search
from blockpruner.engine.sections import Calibration
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.conftest import load, tiny_llama, tiny_tokenizer, write_tiny
from tests.processes import REPOSITORY, command, facts, finish, num_units, wait_for


def order(summary: dict[str, Any]) -> list[tuple[str, int]]:
    return [tuple(step["block"]) for step in summary["steps"]]


@pytest.mark.parametrize("blocks", list(Granularity))
def test_a_run_finds_what_the_official_loop_finds(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, blocks: Granularity
) -> None:
    settings = config(num_remove=2, blocks=blocks)
    summary = run_search(settings, tmp_path / "run", reporter)
    windows = calibration_windows(
        Calibration(calibration=settings.calibration, num_samples=20, seq_len=16, seed=42),
        load_tokenizer(settings.source),
    ).tokens
    official = plain_search(load(settings.model), windows, 2, blocks)
    assert order(summary) == [(str(block.kind), block.layer) for block, _ in official]
    nlls = [step["nll"] for step in summary["steps"]]
    assert nlls == pytest.approx([score.value for _, score in official], rel=1e-5)
    assert summary["status"] == "finished"
    assert summary["calibration"]["num_windows"] == len(windows)


def test_the_run_directory_holds_what_is_promised(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    summary = run_search(config(num_remove=2), tmp_path / "run", reporter)
    on_disk = json.loads((tmp_path / "run" / "run.json").read_text())
    assert on_disk == json.loads(json.dumps(summary))
    for key in ("model", "config", "versions", "kernel", "placement", "num_replicas", "totals"):
        assert on_disk[key] is not None
    scores = pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist()
    assert [row["step"] for row in scores] == [0] + [1] * 8 + [2] * 7
    best = min((row for row in scores if row["step"] == 1), key=lambda row: row["nll"])
    assert best["block"] == ".".join(map(str, on_disk["steps"][0]["block"]))
    sequence = json.loads((tmp_path / "run" / "sequence.json").read_text())
    assert sequence["1"] == [on_disk["steps"][0]["block"]]
    assert len(sequence["2"]) == 2
    types = [json.loads(line)["type"] for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert types[0] == "run"
    assert types.count("step") == 2


def test_more_blocks_can_be_asked_for_later_and_fewer_cannot(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    at_once = run_search(config(num_remove=4), tmp_path / "at once", reporter)
    run_search(config(num_remove=2), tmp_path / "later", reporter)
    assert facts(run_search(config(num_remove=4), tmp_path / "later", reporter)) == facts(at_once)
    with pytest.raises(UserError, match="may grow but not shrink"):
        run_search(config(num_remove=3), tmp_path / "later", reporter)


def test_a_finished_run_is_not_done_again(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_search(config(num_remove=2), tmp_path, reporter)
    monkeypatch.setattr("blockpruner.searching.scores.open_replicas", None)
    assert run_search(config(num_remove=2), tmp_path, reporter) == first


def test_a_run_of_another_config_is_refused_with_all_differences(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    run_search(config(num_remove=1), tmp_path, reporter)
    with pytest.raises(UserError, match=r"`seq_len` was 16, now 8; `seed` was 42, now 7"):
        run_search(config(num_remove=1, seed=7, seq_len=8), tmp_path, reporter)


def test_a_calibration_text_that_changed_is_refused(
    config: Callable[..., SearchConfig], text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    copy = tmp_path / "rows.txt"
    copy.write_text(text_file.read_text())
    run_search(config(num_remove=1, calibration=str(copy)), tmp_path / "run", reporter)
    copy.write_text(text_file.read_text().replace("fox", "dog"))
    with pytest.raises(UserError, match="calibration text or the tokenizer has changed"):
        run_search(config(num_remove=2, calibration=str(copy)), tmp_path / "run", reporter)


def test_a_model_that_changed_is_noticed_on_resume(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    folder = tmp_path / "model"
    write_tiny(folder, seed=1)
    run_search(config(num_remove=1, model=str(folder)), tmp_path / "run", reporter)
    tiny_llama(torch.float32, seed=2).save_pretrained(folder)
    with pytest.raises(UserError, match=r"a run of another model: it began with .*/model' .*, now it is .*/model'"):
        run_search(config(num_remove=2, model=str(folder)), tmp_path / "run", reporter)


def test_a_run_that_began_in_another_dtype_is_not_gone_on_with(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is scored yet that could show it."""
    monkeypatch.setattr("blockpruner.engine.model.loading.cpu_has_bfloat16", lambda: False)
    asked = config(num_remove=1, dtype="auto")
    run_search(asked, tmp_path, reporter)
    ledger = tmp_path / "ledger.jsonl"
    header = ledger.read_bytes().splitlines(keepends=True)[0]
    ledger.write_bytes(header)
    monkeypatch.setattr("blockpruner.engine.model.loading.cpu_has_bfloat16", lambda: True)
    with pytest.raises(UserError, match="began in float32 on cpu, and would go on in bfloat16 on cpu"):
        run_search(asked, tmp_path, reporter)
    assert ledger.read_bytes() == header


def test_a_model_that_gives_nan_ends_the_search_and_says_so(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    folder = tmp_path / "model"
    model = tiny_llama(torch.float32)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(SearchFailed, match="all 8 candidates"):
        run_search(config(num_remove=1, model=str(folder)), tmp_path / "run", reporter)
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["dense"]["nll"] is None
    with pytest.raises(SearchFailed, match="all 8 candidates"):  # and again, not another reason
        run_search(config(num_remove=1, model=str(folder)), tmp_path / "run", reporter)


class SmallMemory:
    """A device that holds calls of at most some sequences."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most: int, depends_on_company: bool = False) -> None:
        self.most = most
        window_sums = ForkedPass.window_sums

        def with_small_memory(
            this: ForkedPass, masks: Sequence[Mask], windows: torch.Tensor, metric: Metric
        ) -> torch.Tensor:
            if this.call_shape.sequences_per_call > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            company = this.call_shape.sequences_per_call + len(masks) if depends_on_company else 0
            return window_sums(this, masks, windows, metric) * (1 + 1e-15 * company)

        monkeypatch.setattr(ForkedPass, "window_sums", with_small_memory)


def test_a_device_that_runs_out_of_memory_at_the_start_gets_smaller_calls(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_search(config(num_remove=2), tmp_path / "plain", reporter)
    SmallMemory(monkeypatch, most=60)
    summary = run_search(config(num_remove=2), tmp_path / "small", reporter)
    assert plain["kernel"]["rows"] == 256
    assert summary["kernel"]["rows"] == 32
    assert facts(summary)[:2] == facts(plain)[:2]


@pytest.mark.parametrize("depends_on_company", [False, True])
def test_a_device_that_runs_out_of_memory_in_mid_run_goes_on_with_smaller_calls_and_resumes(
    config: Callable[..., SearchConfig],
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    depends_on_company: bool,
) -> None:
    memory = SmallMemory(monkeypatch, most=256, depends_on_company=depends_on_company)
    first = run_search(config(num_remove=1), tmp_path, reporter)
    assert first["kernel"]["batch_invariant"] != depends_on_company
    memory.most = 100
    capsys.readouterr()
    # The dense model is compared in the recorded shape, which does not fit any more: then it is scored anew.
    summary = run_search(config(num_remove=2), tmp_path, reporter)
    said = capsys.readouterr().out
    assert "out of memory (CUDA out of memory. Tried to allocate 20.00 GiB): reducing sequences per call from" in said
    assert (first["kernel"]["rows"], summary["kernel"]["rows"]) == (256, 64)
    assert [step["block"] for step in summary["steps"]][:1] == [step["block"] for step in first["steps"]]
    assert run_search(config(num_remove=3), tmp_path, reporter)["kernel"] == summary["kernel"]


@pytest.mark.parametrize("options", [{"strategy": "lazy"}, {"strategy": "evolution", "generations": 2, "offspring": 4}])
def test_memory_that_runs_out_between_two_requests_of_a_step_changes_nothing(
    config: Callable[..., SearchConfig],
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    asked = config(num_remove=4, **options)
    plain = run_search(asked, tmp_path / "plain", reporter)
    memory = SmallMemory(monkeypatch, most=256)
    calls = 0
    with_small_memory = ForkedPass.window_sums

    def shrinking(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        memory.most = 256 if calls < 14 else 60
        return with_small_memory(*args)

    monkeypatch.setattr(ForkedPass, "window_sums", shrinking)
    summary = run_search(asked, tmp_path / "small", reporter)
    assert (plain["kernel"]["rows"], summary["kernel"]["rows"]) == (256, 32)
    assert facts(summary)[:2] == facts(plain)[:2]
    ledger = tmp_path / "small" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[: len(lines) * 3 // 4]))
    assert facts(run_search(asked, tmp_path / "small", reporter))[:2] == facts(plain)[:2]


def test_a_device_that_does_not_hold_the_smallest_call_ends_the_run_with_advice(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallMemory(monkeypatch, most=0)
    with pytest.raises(SearchFailed, match=r"even with the smallest calls \(CUDA out.*`placement=resident` would fit"):
        run_search(config(num_remove=1), tmp_path / "run", reporter)
    assert not (tmp_path / "run").exists()


# ---- real processes ------------------------------------------------------------------------------------------------


def test_a_run_killed_in_the_middle_of_a_step_resumes_to_the_same_bits(
    slow_model: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    arguments = command(slow_model, run, "--no-ray")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    wait_for(lambda: num_units(run, step=2) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done_before = num_units(run, step=2)
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert facts(finish(arguments)) == facts(undisturbed)
    units_of_a_step = num_units(run, step=1)
    assert done_before < units_of_a_step, "it was killed too late to show anything"
    assert num_units(run, step=2) == units_of_a_step, "no unit of the interrupted step was lost or done twice"


@pytest.fixture(scope="module")
def story(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run on two replicas: looked at, a replica killed, interrupted, resumed in process."""
    run = tmp_path_factory.mktemp("ray") / "run"
    arguments = command(slow_model, run, "--replicas", "2")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    ledger = run / "ledger.jsonl"
    # Both replicas have done a unit.
    wait_for(lambda: ledger.exists() and all(f'"replica-{n}"' in ledger.read_text() for n in (0, 1)), process)
    family = psutil.Process(process.pid).children(recursive=True)
    listeners = [
        connection.laddr.ip
        for member in [psutil.Process(process.pid), *family]
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    replicas = [member for member in family if "Replica" in " ".join(member.cmdline() or [member.name()])]
    words = " ".join(word for member in family for word in member.cmdline())
    private = Path(re.findall(r"(/\S*/bp-[^/\s]+)/", words)[0])
    private_mode = private.stat().st_mode & 0o777
    steps_before = max((step for step in (1, 2) if num_units(run, step)), default=0)
    if replicas:
        replicas[0].kill()
        # Ray tells of the death a moment later; Ctrl-C before that would leave nothing to see.
        wait_for(lambda: "it is replaced" in (run / "events.jsonl").read_text(), process)
    wait_for(lambda: num_units(run, steps_before + 1) >= 1, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=10)
    return {
        "run": run,
        "exit_code": process.returncode,
        "stdout": stdout,
        "stderr": stderr,
        "listeners": listeners,
        "killed": len(replicas[:1]),
        "private": private,
        "private_mode": private_mode,
        "alive": [member.name() for member in alive],
        "resumed": finish(command(slow_model, run, "--no-ray")),
    }


class TestOnRay:
    def test_rays_ports_listen_on_loopback_only(self, story: dict[str, Any]) -> None:
        assert len(story["listeners"]) >= 5
        assert all(ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in story["listeners"])

    def test_ctrl_c_ends_it_in_one_line_and_leaves_no_process(self, story: dict[str, Any]) -> None:
        assert story["exit_code"] == 130
        assert story["stderr"].splitlines() == ["stopped; run the same command again to resume"]
        assert story["alive"] == []

    def test_rays_files_lie_in_a_private_folder_that_is_gone_afterwards(self, story: dict[str, Any]) -> None:
        assert story["private_mode"] == 0o700
        assert not story["private"].exists()

    def test_a_killed_replica_is_replaced(self, story: dict[str, Any]) -> None:
        assert story["killed"] == 1
        assert "it is replaced" in story["stdout"]

    def test_the_resumed_run_has_the_bits_of_an_undisturbed_one_in_one_process(
        self, story: dict[str, Any], undisturbed: dict[str, Any]
    ) -> None:
        assert facts(story["resumed"]) == facts(undisturbed)

    def test_scores_tell_which_replicas_made_them(self, story: dict[str, Any]) -> None:
        rows = pq.read_table(story["run"] / "scores.parquet").to_pylist()
        names = {name for row in rows for name in row["replica"].split("+")}
        assert {"replica-0", "replica-1"} <= names <= {"replica-0", "replica-1", "local"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--no-ray"], id="in process"),
        pytest.param(["--replicas", "2"], id="on Ray", marks=pytest.mark.slow),  # TestOnRay stops one by Ctrl-C
    ],
)
def test_sigterm_stops_a_run_as_ctrl_c_does(slow_model: Path, tmp_path: Path, options: list[str]) -> None:
    run = tmp_path / "run"
    arguments = command(slow_model, run, *options)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    wait_for(lambda: num_units(run, step=1) >= 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines() == ["stopped; run the same command again to resume"]
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_a_streamed_search_has_the_bits_of_a_resident_one_and_says_how_it_holds_the_model(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    resident = run_search(config(num_remove=2), tmp_path / "resident", reporter)
    capsys.readouterr()
    streamed = run_search(config(num_remove=1, placement="streamed"), tmp_path / "streamed", reporter)
    assert "streamed model (as asked: " in capsys.readouterr().out
    assert (resident["placement"], streamed["placement"]) == ("resident", "streamed")
    assert facts(run_search(config(num_remove=2), tmp_path / "streamed", reporter)) == facts(resident)
