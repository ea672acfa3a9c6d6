"""Reports: what is drawn and tabulated of real tiny searches, and a page that holds together whatever it is given."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from blockpruner import cli
from blockpruner.engine.blocks import Block, Granularity, Kind
from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.metrics.kl import Kl
from blockpruner.engine.model.decoder import Decoder
from blockpruner.reporting.first_step import draw_first_step
from blockpruner.reporting.influence import read_influence, write_influence
from blockpruner.reporting.mha_share import draw_mha_share, has_mha_share
from blockpruner.reporting.perplexity import draw_perplexity
from blockpruner.reporting.recorded import Recorded, read_recorded
from blockpruner.reporting.removal_order import draw_removal_order
from blockpruner.reporting.repeat import evaluate_command, latency_command, search_command
from blockpruner.reporting.tables import tabulate_agreement, tabulate_steps
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from blockpruner.showing.measurements import tabulate_evaluations, tabulate_latency
from tests import calls
from tests.conftest import load, write_tiny

VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; collects images, links, tables and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.attributes: set[str] = set()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.attributes |= found.keys()
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(found)
        self.links += [found[name] or "" for name in ("href", "src") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Where searches lie, and by their options those that were done."""
    return tmp_path_factory.mktemp("searches"), {}


@pytest.fixture
def search(
    config: Callable[..., SearchConfig], done: tuple[Path, dict[str, Path]], tmp_path: Path, reporter: Reporter
) -> Callable[..., Path]:
    """A run directory of a real search, for the test to do with as it likes. Each search is done once."""

    def run(name: str = "run", **options: Any) -> Path:
        folder, runs = done
        key = repr(options)
        if key not in runs:
            runs[key] = folder / str(len(runs))
            run_search(config(**{"num_remove": 3, **options}), runs[key], reporter)
        return shutil.copytree(runs[key], tmp_path / name)

    return run


def test_the_page_is_whole_needs_nothing_else_and_shows_every_picture(
    search: Callable[..., Path], reporter: Reporter
) -> None:
    run = search()
    written = calls.report([run], None, reporter)
    names = ["removal_order", "perplexity", "mha_share", "first_step", "timeline"]
    assert [Path(path).name for path in written["pictures"]] == [f"{n}.{s}" for n in names for s in ("png", "svg")]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in written["pictures"][::2])
    assert all("<svg" in Path(path).read_text() for path in written["pictures"][1::2])
    text = Path(written["page"]).read_text()
    page = Page(text)
    assert len(page.images) == len(names)
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/svg+xml;base64,") for image in page.images)
    assert all(link.startswith("data:") or link.removeprefix("#") in page.ids for link in page.links)
    assert "http" not in text
    assert "NaN" not in text
    assert "nan" not in page.text


def test_the_same_run_gives_the_same_bytes(search: Callable[..., Path], reporter: Reporter) -> None:
    first = calls.report([search()], None, reporter)
    again = calls.report([search("again/run")], None, reporter)
    for one, other in zip([*first["pictures"], first["page"]], [*again["pictures"], again["page"]], strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_names_that_look_like_html_or_formulas_are_shown_as_they_are(
    search: Callable[..., Path], tiny_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    model = tmp_path / "a$_{b}$ <script>alert(1)<" / 'img src="x" onerror="y">&amp;'
    shutil.copytree(tiny_folder, model)
    one, other = search("one <b>", model=str(model)), search("$x$", model=str(model), strategy="lazy")
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({"model": "<script>", "tasks": {"<i>": {"score": 0.5}}}))
    page = Page(
        Path(calls.report([one, other], tmp_path / "out", reporter, evaluation=[evaluation])["page"]).read_text()
    )
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert "onerror" not in page.attributes
    assert str(model) in page.text
    assert "<i> (%)" in page.text


def test_runners_up_are_the_next_best_of_the_candidates_scored_in_full(search: Callable[..., Path]) -> None:
    (run,) = read_recorded([search()])
    for step in run.steps:
        values = sorted(run.value(row) for row in run.scores if row["step"] == step["step"])
        assert [value for _, value in run.runners_up(step["step"])] == values[1:3]
        assert run.value(step) == values[0]
    second = run.runners_up(1)[0]
    assert tabulate_steps(run).rows[0][4] == f"{second[0]} +{second[1] - run.value(run.steps[0]):.4f}"


@pytest.mark.parametrize(
    "options",
    [{"per": "params"}, {"strategy": "evolution", "generations": 2, "offspring": 4}, {"strategy": "one-shot"}],
)
def test_no_runner_up_is_named_where_the_lowest_loss_did_not_choose(
    search: Callable[..., Path], options: dict[str, Any]
) -> None:
    (run,) = read_recorded([search(**options)])
    assert not any(run.runners_up(step["step"]) for step in run.steps)


def test_a_lazy_first_step_tells_estimates_from_scores(search: Callable[..., Path]) -> None:
    (run,) = read_recorded([search(strategy="lazy", num_samples=39)])
    points = run.first_step()
    estimated = {(block.layer, point.value) for block, point in points.items() if not point.exact}
    assert len(points) == 8
    assert estimated
    marks = [tuple(offset) for drawn in draw_first_step(run).axes[0].collections for offset in drawn.get_offsets()]
    assert set(marks) == estimated


@pytest.mark.parametrize(
    ("strategy", "what"),
    [("lazy", "block or\nits last group"), ("multipruner", "block")],
    ids=["groups", "whole blocks"],
)
def test_the_first_step_says_what_was_left_out(search: Callable[..., Path], strategy: str, what: str) -> None:
    (run,) = read_recorded([search(strategy=strategy, units="all", num_remove=None, ratio=0.2)])
    assert draw_first_step(run).axes[0].get_ylabel().endswith(f"without the {what}")


def test_the_first_step_has_three_panels_with_block_influence_and_one_without(
    search: Callable[..., Path], reporter: Reporter
) -> None:
    path = search()
    (run,) = read_recorded([path])
    assert len(draw_first_step(run).axes) == 1
    write_influence(path, reporter)
    (run,) = read_recorded([path])
    losses, blocks, layers = draw_first_step(run).axes
    assert [line.get_label() for line in losses.lines] == ["MHA", "MLP", "dense"]
    assert [len(line.get_xdata()) for line in blocks.lines] == [4, 4]
    assert list(layers.lines[0].get_ydata()) == [run.influence[Block(Kind.LAYER, index)] for index in range(4)]


def test_a_few_huge_losses_do_not_hide_the_others(search: Callable[..., Path]) -> None:
    (run,) = read_recorded([search()])
    rows = [{**row, "perplexity": 1e6} if row["mask"] == "mlp.0" else row for row in run.scores]
    rows = [{**row, "perplexity": None} if row["mask"] == "mha.1" else row for row in rows]
    axes = draw_first_step(replace(run, scores=rows)).axes[0]
    assert axes.get_ylim()[1] < 1e5
    assert "1,000,000" in axes.texts[-1].get_text()
    assert 1 not in axes.lines[0].get_xdata()


def test_the_share_of_mha_is_drawn_where_a_search_could_choose(search: Callable[..., Path]) -> None:
    (run,) = read_recorded([search()])
    (line, _) = draw_mha_share([run]).axes[0].lines
    kinds = [block.kind is Kind.MHA for block in run.blocks]
    assert list(line.get_ydata()) == pytest.approx([100 * sum(kinds[:n]) / n for n in (1, 2, 3)])
    (layers,) = read_recorded([search("layers", blocks=Granularity.LAYER)])
    assert not has_mha_share(layers)


def test_several_runs_are_told_apart_by_what_differs_in_their_configs(
    search: Callable[..., Path], tmp_path: Path, reporter: Reporter
) -> None:
    greedy, lazy = search("a"), search("b", strategy="lazy")
    runs = read_recorded([greedy, lazy])
    assert [run.label for run in runs] == ["strategy greedy", "strategy lazy"]
    legend = [text.get_text() for text in draw_perplexity(runs).axes[0].get_legend().get_texts()]
    assert legend[:3] == ["strategy greedy", "strategy lazy", "dense"]
    assert [axes.get_title(loc="left") for axes in draw_removal_order(runs).axes] == legend[:2]
    written = calls.report([greedy, lazy], tmp_path / "both", reporter)
    assert {"first_step-1.png", "first_step-2.png", "timeline-2.svg"} <= {Path(p).name for p in written["pictures"]}
    assert "Agreement" in Page(Path(written["page"]).read_text()).text


def test_runs_of_one_config_are_told_apart_by_their_directories(search: Callable[..., Path], tmp_path: Path) -> None:
    run = search()
    shutil.copytree(run, tmp_path / "copy")
    assert [found.label for found in read_recorded([run, tmp_path / "copy"])] == ["run", "copy"]
    assert read_recorded([run])[0].label == "run"


def test_each_metric_has_a_panel_of_its_own(search: Callable[..., Path]) -> None:
    runs = read_recorded([search("ppl"), search("kl", metric=Kl())])
    assert [run.dense for run in runs] == [runs[0].summary["dense"]["perplexity"], 0]
    panels = draw_perplexity(runs).axes
    assert [axes.get_ylabel() for axes in panels] == ["calibration perplexity", "calibration KL divergence"]


def with_order(run: Recorded, label: str, *order: str) -> Recorded:
    steps = [{"step": step, "block": Block.parse(name).to_json()} for step, name in enumerate(order, start=1)]
    return replace(run, label=label, summary={**run.summary, "steps": steps})


def test_agreement_is_over_the_removals_that_both_runs_have(search: Callable[..., Path]) -> None:
    (run,) = read_recorded([search()])
    one = with_order(run, "one", "mha.0", "mlp.1", "mha.2", "mha.3")
    other = with_order(run, "other", "mha.0", "mha.2", "mha.2", "mha.3", "mlp.3")
    third = with_order(run, "third", "layer.0")
    rows = tabulate_agreement([one, other, third]).rows
    assert rows[0] == ["one", "other", "4", "1", "3", "0.75"]
    assert rows[1] == ["one", "third", "1", "0", "0", "0.50"]


def test_the_search_command_of_a_report_makes_the_same_config(
    search: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"strategy": "lazy", "keep": ("mha.0", "mlp.1"), "tolerance": "1se", "max_mha": 2, "num_windows": 3}
    (run,) = read_recorded([search("a run", **options)])
    command = shlex.split(search_command(run))
    seen: list[SearchConfig] = []
    monkeypatch.setattr(
        "blockpruner.searching.driver.run_search", lambda config, out, reporter: seen.append(config) or {}
    )
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    assert seen == [run.config]
    assert command[-2:] == ["--out", "a run"]
    assert "--seed" not in command, "what is the default is not said"


def test_the_commands_of_runs_in_directories_of_one_name_are_told_apart(
    search: Callable[..., Path], tmp_path: Path, reporter: Reporter
) -> None:
    runs = [search("a b/run"), search("c/run", strategy="lazy")]
    page = Page(Path(calls.report(runs, tmp_path / "both", reporter)["page"]).read_text())
    commands = [shlex.split(line) for line in page.text.splitlines() if line.startswith("blockpruner ")]
    one, other = map(str, runs)
    outs = [one, other, f"{one}-pruned", f"{other}-pruned", str(tmp_path / "both")]
    assert [command[command.index("--out") + 1] for command in commands] == outs
    assert [command[command.index("--run") + 1] for command in commands[2:4]] == [one, other]
    assert commands[4][2:4] == [one, other]


def test_the_page_has_the_commands_of_its_tables(
    search: Callable[..., Path], tmp_path: Path, reporter: Reporter
) -> None:
    setting = {"tasks": ["piqa", "arc"], "limit": 100, "seq_len": None, "run": "run", "num_remove": [0, 4]}
    setting |= {"perplexity": ["builtin", "my text"], "trust_remote_code": True, "versions": {"torch": "2"}}
    evaluation = written(tmp_path / "my evaluation.json", {"model": "m", "rows": [], "setting": setting})
    (tmp_path / "folder").mkdir()
    folder = written(tmp_path / "folder" / "evaluation.json", {"model": "m", "setting": {"tasks": ["piqa"]}})
    speed = {"device": "cpu", "static_cache": True, "model": "m-pruned", "dense": None, "no_dense": False}
    latency = written(tmp_path / "latency.json", {"pruned": {}, "setting": speed})
    expected = [
        "blockpruner evaluate m --tasks piqa,arc --limit 100 --run run --num-remove 0,4 --perplexity builtin "
        f"--perplexity 'my text' --trust-remote-code --json > '{evaluation}'",
        f"blockpruner evaluate m --tasks piqa --out {folder.parent}",
        f"blockpruner latency m-pruned --device cpu --static-cache --json > {latency}",
    ]
    assert [evaluate_command(evaluation), evaluate_command(folder), latency_command(latency)] == expected
    found = calls.report([search()], None, reporter, evaluation=[evaluation, folder], latency=[latency])
    page = Page(Path(found["page"]).read_text())
    assert "\n".join(expected) in page.text


@pytest.mark.parametrize(
    "found", [{}, {"setting": {"tasks": ["piqa"]}}, {"model": "m", "rows": [], "setting": {"run": None}}]
)
def test_a_file_that_does_not_record_its_command_is_named(tmp_path: Path, found: dict[str, Any]) -> None:
    path = written(tmp_path / "found.json", found)
    for command in (evaluate_command, latency_command):
        assert command(path) == f"# {str(path)!r} does not record the command that made it"


# ---- block influence -----------------------------------------------------------------------------------------------


def test_influence_is_measured_once_on_the_runs_own_windows(
    search: Callable[..., Path], config: Callable[..., SearchConfig], tiny_folder: Path, text_file: Path,
    reporter: Reporter, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from blockpruner.searching.resolving import prepare

    run = search()
    summary = calls.report([run], None, reporter, influence=True)
    before = (run / "influence.json").read_text()
    windows = prepare(config(num_remove=3), reporter).windows
    expected = measure_influence(Decoder(load(tiny_folder)), windows.tokens).block_influence
    assert read_influence(run, windows.fingerprint) == pytest.approx(expected)
    assert "block influence of each block" in Path(summary["page"]).read_text()
    write_influence(run, reporter)
    assert "influence.json already exists" in capsys.readouterr().out
    assert (run / "influence.json").read_text() == before


def test_influence_of_other_windows_is_refused(
    config: Callable[..., SearchConfig], text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    text = tmp_path / "rows.txt"
    shutil.copy(text_file, text)
    run_search(config(num_remove=1, calibration=str(text)), tmp_path / "run", reporter)
    text.write_text(text.read_text().replace("fox", "dog"))
    with pytest.raises(UserError, match="calibration text or the tokenizer has changed"):
        calls.report([tmp_path / "run"], tmp_path / "out", reporter, influence=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "run" / "influence.json").write_text('{"fingerprint": "other", "block_influence": {}}')
    with pytest.raises(UserError, match="other calibration text"):
        calls.report([tmp_path / "run"], None, reporter)


# ---- tables of other commands --------------------------------------------------------------------------------------


def written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_evaluations_of_models_and_of_masks_lie_in_one_table(tmp_path: Path) -> None:
    one = written(
        tmp_path / "dense.json",
        {
            "tasks": {"piqa": {"acc": 0.6, "acc_norm": 0.7, "stderr": 0.01, "score": 0.7}, "arc": {"score": 0.25}},
            "average": 0.475,
            "perplexity": {"wikitext2": {"value": 12.345, "stderr": 0.251}, "other": {"value": 2.5, "stderr": None}},
            "setting": {"limit": 100, "batch_size": 1, "seq_len": [512], "versions": {"torch": "2"}, "revision": None},
        },
    )
    masks = written(
        tmp_path / "masks.json",
        {
            "model": "m",
            "rows": [
                {"num_remove": 4, "ratio": 0.031, "tasks": {"arc": {"acc": 0.2, "score": 0.2}}, "average": None},
                {},
            ],
        },
    )
    groups = written(tmp_path / "groups.json", {"rows": [{"num_remove": 9, "mask": "mlp.0/4+mlp.1/4"}]})
    assert tabulate_evaluations([groups]).header == ["model", "removals"]
    table = tabulate_evaluations([one, masks])
    assert table.header == [
        "model", "blocks removed", "removed (%)", "piqa (%)", "arc (%)", "average (%)", "perplexity, wikitext2",
        "perplexity, other",
    ]  # fmt: skip
    assert table.rows == [
        ["dense", "", "", "70.00 ± 1.00", "25.00", "47.50", "12.35 ± 0.25", "2.50"],
        ["m", "4", "3.10", "", "20.00", "", "", ""],
        ["m", "", "", "", "", "", "", ""],
    ]
    assert table.caption == (
        "value ± standard error; dense: batch size 1, only the first 100 questions of each task, perplexity over "
        "windows of 512 tokens, torch 2; m: setting not recorded"
    )


def test_speeds_stand_beside_those_of_the_dense_model(tmp_path: Path) -> None:
    spread = {"decode_tokens_per_s": [19.0, 21.5]}
    dense = {"decode_tokens_per_s": 20.0, "weights_bytes": 2**21, "peak_memory_bytes": None, "spread": spread}
    pruned = {"decode_tokens_per_s": 30, "weights_bytes": 2**20, "spread": {"decode_tokens_per_s": None}}
    # The median of the rounds' ratios is not the ratio of the medians.
    ratio = {"decode_tokens_per_s": 1.42, "weights_bytes": 0.5, "spread": {"decode_tokens_per_s": [1.38, 1.55]}}
    setting = {"device": "cpu", "dtype": "bfloat16", "threads": 2, "repeats": 20, "static_cache": False}
    found = {"dense": dense, "pruned": pruned, "ratio": ratio, "setting": setting}
    both = tabulate_latency(written(tmp_path / "a.json", found))
    assert both.header == ["", "dense", "pruned", "pruned / dense"]
    assert ["decoding, tokens/s", "20.00 (19.00–21.50)", "30.00", "1.42 (1.38–1.55)"] in both.rows
    assert ["weights, MiB", "2.00", "1.00", "0.50"] in both.rows
    assert both.caption == "a: median (quartiles); cpu, bfloat16, 2 CPU threads, 20 repeats"
    alone = tabulate_latency(written(tmp_path / "b.json", {"dense": dense}))
    assert (alone.header, alone.caption) == (["", "dense"], "b: median (quartiles); setting not recorded")
    assert tabulate_latency(written(tmp_path / "c.json", {"dense": dense, "pruned": pruned})).header[-1] == "pruned"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[1]", "got a list"), ("3", "got a int"), (None, "No such file")],
)
def test_a_file_that_is_no_json_object_is_refused_before_anything_is_written(
    search: Callable[..., Path], tmp_path: Path, reporter: Reporter, text: str | None, message: str
) -> None:
    run, file = search(), tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    for options in ({"evaluation": [file]}, {"latency": [file]}):
        with pytest.raises(UserError, match=message):
            calls.report([run], tmp_path / "out", reporter, **options)
    assert not (tmp_path / "out").exists()


# ---- what cannot be reported ---------------------------------------------------------------------------------------


def test_runs_that_cannot_be_reported_are_refused(
    search: Callable[..., Path], tmp_path: Path, reporter: Reporter
) -> None:
    run = search()
    with pytest.raises(UserError, match="expected a run directory"):
        calls.report([tmp_path / "nowhere"], None, reporter)
    with pytest.raises(UserError, match="expected `out`"):
        calls.report([run, tmp_path / "other"], None, reporter)
    with pytest.raises(UserError, match="each run once"):
        calls.report([run, tmp_path / "." / "run"], tmp_path / "out", reporter)
    model = tmp_path / "model"
    write_tiny(model, seed=1)
    other = search("other", model=str(model))
    with pytest.raises(UserError, match="expected runs of one model"):
        calls.report([run, other], tmp_path / "out", reporter)
    ledger = (other / "ledger.jsonl").read_text().splitlines(keepends=True)
    (other / "ledger.jsonl").write_text(ledger[0])
    with pytest.raises(UserError, match="at least one step"):
        calls.report([other], None, reporter)
    (run / "scores.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is damaged"):
        calls.report([run], None, reporter)
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_scores_and_events_is_drawn_as_far_as_it_goes(
    search: Callable[..., Path], reporter: Reporter
) -> None:
    run = search()
    (run / "scores.parquet").unlink()
    (run / "events.jsonl").unlink()
    report = calls.report([run], None, reporter)
    assert [Path(path).stem for path in report["pictures"][::2]] == ["removal_order", "perplexity", "mha_share"]
    assert "No scores.parquet in run" in Page(Path(report["page"]).read_text()).text
