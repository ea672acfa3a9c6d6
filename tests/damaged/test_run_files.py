"""Damaged files of runs, checkpoints, evaluations and comparisons are read, or refused in one line that names them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockpruner.comparing.running import read_outcome
from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.card import model_card
from blockpruner.engine.checkpoint.formats.grouped import Grouped
from blockpruner.engine.checkpoint.grouped import read_pruned_provenance
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.classes.pruned import _check_values
from blockpruner.engine.model.loading import meta_model
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.sections import ModelSource
from blockpruner.reporting.influence import read_influence
from blockpruner.reporting.recorded import read_recorded
from blockpruner.reporting.repeat import evaluate_command, latency_command
from blockpruner.reporting.tables import tabulate_overview, tabulate_steps, tabulate_versions
from blockpruner.searching.reading import Removals, read_events, read_scores, read_summary
from blockpruner.searching.sequence import official_sequence, read_official_sequence
from blockpruner.showing.measurements import tabulate_evaluations, tabulate_latency
from tests.conftest import tiny_llama
from tests.damaged.damage import damaged_json, outcome
from tests.processes import REPOSITORY

EXAMPLES = int(os.environ.get("DAMAGED_EXAMPLES", "120"))
RUNS = REPOSITORY / "tests" / "recorded" / "runs"
fuzz = settings(derandomize=True, max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = {"num_threads": 1, "startup_s": 1.0, "load_s": 1.0, "peak_memory_bytes": 1, "search_s": 1.0, "work_flops": 1}
SPEED = {
    "prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 8.0, "generate_128_s": 1.0, "kv_cache_bytes_per_token": 96,
    "peak_memory_bytes": 1024, "weights_bytes": 1024, "spread": {"decode_tokens_per_s": [7.0, 9.0]},
}  # fmt: skip
PROVENANCE = {
    "format": "grouped", "base_model": "/models/dense", "revision": None, "base_fingerprint": "2:00",
    "dtype": "float32", "num_parameters": 9, "num_parameters_dense": 10, "ratio": 0.1,
    "removed": [["mha", 1], ["mlp", 2]],
    "calibration": {"num_windows": 1, "num_tokens": 16, "fingerprint": "0", "calibration": "builtin",
                    "num_samples": 1, "seq_len": 16, "seed": 42},
    "dense": {"nll": 1.0, "perplexity": 2.0}, "pruned": {"nll": 1.0, "perplexity": 2.0},
    "recovery": {"config": {"rank": 8, "data": "alpaca"}, "num_rows": 4,
                 "perplexity": {"rest": {"dense": 1.0, "pruned": 2.0, "recovered": 1.5, "recovered_share": 0.5}}},
    "blockpruner": "0.1.0",
}  # fmt: skip
FILES: dict[str, Any] = {
    "sequence": official_sequence(sorted(Mask.parse("mha.3+mlp.1+mha.0").absent, key=str)),
    "provenance": PROVENANCE,
    "evaluation": {
        "model": "m", "tasks": {"piqa": {"acc": 0.5, "score": 0.5, "stderr": 0.1}}, "average": 0.5,
        "perplexity": {"builtin": {"value": 9.0, "stderr": 0.1, "seq_len": 16}},
        "rows": [{"num_remove": 1, "ratio": 0.1, "tasks": {}, "average": None, "perplexity": {}}],
        "setting": {"device": "cpu", "run": "run", "seq_len": [16], "versions": {"torch": "2"}, "num_remove": [1]},
    },
    "latency": {"dense": SPEED, "pruned": SPEED, "ratio": {"decode_tokens_per_s": 1.0},
                "setting": {"model": "m", "repeats": 2}},
    "influence": {"fingerprint": "0", "block_influence": {"mha.0": 0.5, "layer.1": None}},
    "ordered": {**NUMBERS, "steps": [{"block": ["mha", 1], "ratio": 0.1, "search_s": 1.0, "work_flops": 1}]},
    "rebuilt": {**NUMBERS, "ratio": 0.1},
}  # fmt: skip


def card_of(folder: Path) -> None:
    provenance = read_pruned_provenance(folder)
    model_card("name", Grouped(), provenance, licence=None, notes=[], command="")


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "sequence": ("order.json", read_official_sequence),
    "provenance": ("blockpruner.json", lambda file: card_of(file.parent)),
    "evaluation": ("evaluation.json", lambda file: (tabulate_evaluations([file]), evaluate_command(file))),
    "latency": ("latency.json", lambda file: (tabulate_latency(file), latency_command(file))),
    "influence": ("influence.json", lambda file: read_influence(file.parent, "0")),
    "ordered": ("outcome.json", read_outcome),
    "rebuilt": ("outcome.json", read_outcome),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("kind", FILES)
def test_whole_files_are_read(folder: Path, kind: str) -> None:
    name, read = READERS[kind]
    (folder / name).write_text(json.dumps(FILES[kind]))
    read(folder / name)


@given(st.sampled_from(sorted(FILES)), st.data())
@settings(fuzz, max_examples=3 * EXAMPLES)
def test_a_damaged_file_is_read_or_refused(folder: Path, kind: str, data: st.DataObject) -> None:
    name, read = READERS[kind]
    (folder / name).write_bytes(data.draw(damaged_json(json.dumps(FILES[kind]))))
    outcome(lambda: read(folder / name))


@given(st.sampled_from(["greedy", "lazy", "kl", "layer", "evolution"]), st.booleans(), st.data())
@fuzz
def test_a_damaged_run_json_is_read_or_refused_and_never_believed_against_the_ledger(
    folder: Path, name: str, keep_ledger: bool, data: st.DataObject
) -> None:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(RUNS / name, run)
    order = Removals.read(run).order
    if not keep_ledger:
        (run / "ledger.jsonl").unlink()
    (run / "run.json").write_bytes(data.draw(damaged_json((run / "run.json").read_text())))

    def read() -> None:
        recorded = read_recorded([run])
        for one in recorded:
            one.first_step()
            tabulate_overview([one])
            tabulate_versions([one])
            tabulate_steps(one)
        if keep_ledger:
            assert Removals.read(run).order == order

    outcome(read)


@given(st.data())
@fuzz
def test_damaged_events_are_left_out(folder: Path, data: st.DataObject) -> None:
    lines = (RUNS / "greedy" / "events.jsonl").read_text().splitlines()
    lines[2] = data.draw(damaged_json(lines[2])).decode("latin-1")
    (folder / "events.jsonl").write_text("\n".join(lines), encoding="latin-1")
    assert len(read_events(folder)) >= len(lines) - 1


@pytest.mark.parametrize("column", ["step", "block", "mask", "exact", "perplexity"])
@pytest.mark.parametrize("values", ["dropped", "text", "null"])
def test_scores_that_are_not_those_of_the_ledger_are_refused(folder: Path, column: str, values: str) -> None:
    run = folder / "scored"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(RUNS / "greedy", run)
    table = pyarrow.parquet.read_table(run / "scores.parquet")
    place = table.column_names.index(column)
    table = table.remove_column(place)
    if values != "dropped":
        table = table.add_column(place, column, [["x" if values == "text" else None] * table.num_rows])
    pyarrow.parquet.write_table(table, run / "scores.parquet")
    if (column, values) == ("perplexity", "dropped"):
        assert read_scores(run)
        return
    with pytest.raises(UserError, match=r"scores.parquet' is damaged"):
        read_scores(run)


@pytest.fixture(scope="module")
def pruned_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pruned")
    prune(tiny_llama(torch.float32), Mask.parse("mha.1+mlp.0")).save_pretrained(folder)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


OURS = ("auto_map", "block_groups", "source_num_hidden_layers", "source_lists")


@given(st.data())
@fuzz
def test_a_damaged_config_of_a_pruned_checkpoint_is_refused_or_means_a_model_of_its_blocks(
    pruned_config: dict[str, Any], folder: Path, data: st.DataObject
) -> None:
    text = json.dumps({key: pruned_config[key] for key in OURS})
    try:
        values = json.loads(data.draw(damaged_json(text)))
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict) and outcome(lambda: _check_values(values) or True):
        assert values["block_groups"]


def test_a_pruned_checkpoint_with_blocks_out_of_order_is_refused(pruned_config: dict[str, Any], folder: Path) -> None:
    wrong = {**pruned_config, "block_groups": pruned_config["block_groups"][::-1]}
    (folder / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="the blocks are not in the order of a model with 4 layers"):
        meta_model(ModelSource(str(folder)), "float32")


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing", "link to nothing"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    def put(path: Path) -> None:
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link to nothing":
            path.symlink_to(tmp_path / "gone")

    for name, read in [*READERS.values(), ("run.json", lambda file: read_summary(file.parent))]:
        put(tmp_path / name) if not (tmp_path / name).exists() and not (tmp_path / name).is_symlink() else None
        if name == "influence.json" and kind in ("nothing", "link to nothing"):
            continue  # it was not measured
        with pytest.raises(UserError):
            read(tmp_path / name)
    run = shutil.copytree(RUNS / "greedy", tmp_path / "run")
    put(run / "ledger.jsonl")
    if kind in ("folder", "pipe"):
        with pytest.raises(UserError, match=r"expected a file, got '.*ledger.jsonl', which is a"):
            read_summary(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": [["mha", true]]}', "1.0: expected a block such as"),
        ('{"1": [["mha", 2.7]]}', "1.0"),
        ('{"1": [["mha", 1], ["mha", 1]]}', "step 1 has a block twice"),
        ('{"1": [["mha", 1]], "1": [["mha", 2]]}', "the key '1' stands twice in one object"),
        ('{"1": [["mha", 1e999]]}', "1e999 is not a finite number"),
        ("[" * 100_000, "it is nested too deeply"),
        ("\ufeff{}", "not JSON at line 1, column 1"),
    ],
)
def test_the_message_names_the_place_and_what_was_expected(folder: Path, text: str, message: str) -> None:
    (folder / "order.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"order.json' is damaged .*{message}.*expected the official format"):
        read_official_sequence(folder / "order.json")
