"""Every command that takes a model refuses a folder that is none: exit code 2, one line, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpruner.cli import main
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.model.surgery import prune
from tests.conftest import tiny_llama, tiny_tokenizer

SMALL = "--num-samples 20 --seq-len 16 --num-windows 1 --threads-per-replica 1 --no-ray"
OF_DENSE = {
    "search": f"MODEL --calibration TEXT {SMALL} --num-remove 1 --out OUT",
    "prune": "MODEL --sequence ORDER --out OUT",
    "evaluate": "MODEL --perplexity TEXT --seq-len 16 --num-windows 1 --no-ray --out OUT",
    "latency": "MODEL --repeats 1 --prompt-len 4 --num-tokens 4",
    "compare": f"MODEL --calibration TEXT {SMALL} --methods shortgpt --ratio 0.1 --out OUT",
    "plan": "MODEL --seq-len 16 --num-windows 1",
}
OF_PRUNED = {
    "evaluate": OF_DENSE["evaluate"],
    "latency": f"{OF_DENSE['latency']} --no-dense",
    "export": "MODEL --out OUT",
    "recover": "MODEL --data TEXT --num-rows 2 --seq-len 16 --out OUT",
}


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pruned"
    folder.mkdir()
    model = prune(tiny_llama(torch.float32), Mask.of([Block.parse("mlp.1")]))
    values = {"format": "grouped", "base_model": "x", "revision": None, "dtype": "float32", "removed": [["mlp", 1]]}
    counts = {"ratio": 0.1, "num_parameters": 1, "num_parameters_dense": 2, "blockpruner": "0.1.0"}
    write_grouped(model, tiny_tokenizer(), {**values, **counts}, folder)
    return folder


def config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def quantised(folder: Path) -> None:
    config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def no_layers(folder: Path) -> None:
    config(folder, num_hidden_layers=-1)


def adapted(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def waiting(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def unused(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), "score.weight": torch.zeros(2, 32)}, file, metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [quantised, no_layers, adapted, waiting, unused, cut_short])
@pytest.mark.parametrize(
    ("kind", "command"), [("dense", name) for name in OF_DENSE] + [("pruned", name) for name in OF_PRUNED]
)
def test_a_command_refuses_what_is_no_model_and_writes_nothing(
    tiny_folder: Path,
    pruned_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    command: str,
    damage: Callable[[Path], None],
) -> None:
    folder = shutil.copytree(tiny_folder if kind == "dense" else pruned_folder, tmp_path / "model")
    damage(folder)
    (tmp_path / "order.json").write_text('{"1": [["mlp", 1]]}')
    places = {"MODEL": folder, "TEXT": text_file, "ORDER": tmp_path / "order.json", "OUT": tmp_path / "out"}
    words = (OF_DENSE if kind == "dense" else OF_PRUNED)[command].split()
    monkeypatch.setattr(sys, "argv", ["blockpruner", command, *(str(places.get(word, word)) for word in words)])
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "cache")
    with pytest.raises(SystemExit) as ended:
        main()
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, last
    assert last.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before
