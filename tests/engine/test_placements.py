"""Resident, streamed and sharded models: the same scores, and every tensor where it is computed with."""

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blockpruner.engine.blocks import Block, Kind, Mask, OrderedBy
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model import streaming
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.holding import load_decoder
from blockpruner.engine.model.streaming import LayerStream, stream_layers
from blockpruner.engine.model.weights import Casting, moved
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.narrowing import ImportanceUnit, NarrowingReplica, OrderedUnit
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import ModelBytes, Placement, choose_placement, resolve_placement, split_layers
from blockpruner.engine.work.units import KernelShape, make_unit
from tests.conftest import tiny_llama
from tests.engine.architectures import ROWS, SOME_ROWS
from tests.engine.fake_gpus import MORE_NAMES, NAMES
from tests.engine.test_architectures import MASKS, windows
from tests.engine.test_narrower import order_of

CALL_SHAPE = CallShape(sequences_per_call=5, tokens_per_head_call=7)
REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SOME_ROWS)
def test_all_placements_score_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """From a file of another dtype than is computed in, so that weights are cast as they move."""
    ROWS[name].model().to(torch.bfloat16).save_pretrained(tmp_path)

    def sums(placement: Placement, devices: list[torch.device]) -> torch.Tensor:
        decoder = load_decoder(ModelSource(str(tmp_path)), "float32", placement, devices)
        check_removable(decoder)
        return ForkedPass(decoder, CALL_SHAPE).window_sums(MASKS, windows())

    resident = sums(Placement.RESIDENT, [CPU])
    assert torch.equal(sums(Placement.STREAMED, [CPU]), resident)
    assert torch.equal(sums(Placement.SHARDED, [CPU, CPU, CPU]), resident)


HEADS_AND_CHANNELS = (Kind.MHA, Kind.MLP)
GROUPS = [Mask.parse(text) for text in ("mlp.0/4", "mlp.0/4+mlp.0/3+mha.1", "mlp.3/4+mlp.3/3+mlp.3/2+mlp.1")]
KERNEL = KernelShape(rows=5, head_tokens=7, masks=20, windows=2, threads=1)


@pytest.mark.parametrize("placement", [Placement.STREAMED, Placement.SHARDED])
@pytest.mark.parametrize("name", ["llama biased", *(pytest.param(n, marks=pytest.mark.slow) for n in ("phi3", "gpt2"))])
def test_all_placements_measure_and_score_groups_to_the_same_bits(
    name: str, placement: Placement, tmp_path: Path
) -> None:
    """From a file of a wider dtype than is computed in, so that the norms of its weights are others."""
    ROWS[name].model().float().save_pretrained(tmp_path)

    def found(placement: Placement, num_devices: int) -> list[Any]:
        decoder = load_decoder(ModelSource(str(tmp_path)), "bfloat16", placement, [CPU] * num_devices)
        replica = NarrowingReplica(decoder, windows(), HEADS_AND_CHANNELS)
        by_weights, _ = replica.score(ImportanceUnit(0, 1, HEADS_AND_CHANNELS, 1.0, OrderedBy.WEIGHTS))
        importance, _ = replica.score(ImportanceUnit(0, 2, HEADS_AND_CHANNELS, 1.0))
        masks = [*GROUPS, Mask.parse("mha.2/2+mlp.1/4")] if Block(Kind.MHA, 2) in decoder.narrow else GROUPS
        unit = make_unit([*MASKS[:6], *masks], 0, 2, decoder.shape, KERNEL, 12)
        order = ChannelOrder.by(importance)
        answers = [OrderedUnit(unit, order), OrderedUnit(unit, order_of(decoder)), OrderedUnit(unit, order)]
        dense = make_unit(MASKS, 0, 2, decoder.shape, KERNEL, 12)
        sums = [replica.score(one)[0] for one in (dense, *answers, dense)]
        assert sums[0] == sums[4]
        assert sums[1] == sums[3]
        assert sums[1] != sums[2], "which channels are left matters"
        found = [{str(block): values.tolist() for block, values in one.items()} for one in (importance, by_weights)]
        return [order.digest, *found, *sums]

    assert found(placement, 1 if placement is Placement.STREAMED else 3) == found(Placement.RESIDENT, 1)


def test_a_streamed_model_with_channels_in_an_order_stays_where_it_is_mapped(tmp_path: Path) -> None:
    tiny_llama(torch.float32).save_pretrained(tmp_path)
    decoder = load_decoder(ModelSource(str(tmp_path)), "float32", Placement.STREAMED, [CPU])

    @torch.inference_mode()
    def at_rest() -> list[torch.Tensor]:
        decoder.layers[2](*_call(decoder))
        return [layer.mlp.up_proj.weight for layer in decoder.layers]  # type: ignore[union-attr, misc]

    before = [weight.detach() for weight in at_rest()]
    copies = [weight.clone() for weight in before]
    order = order_of(decoder)
    decoder.put_in_order(order)
    ForkedPass(decoder, CALL_SHAPE).window_sums(GROUPS, windows())
    now = at_rest()
    assert [weight.data_ptr() == old.data_ptr() for weight, old in zip(now, before, strict=True)] == [
        True, True, False, True,
    ], "only the layer at hand has a copy"  # fmt: skip
    assert torch.equal(now[2], copies[2][torch.from_numpy(order.channels[Block(Kind.MLP, 2)]).long()])
    decoder.put_in_order(None)
    assert [weight.data_ptr() for weight in at_rest()] == [weight.data_ptr() for weight in before]
    assert all(torch.equal(weight, copy) for weight, copy in zip(at_rest(), copies, strict=True))


def test_a_streamed_layer_holds_its_own_weights_only_while_it_is_in_use() -> None:
    model = tiny_llama(torch.bfloat16)
    layers = list(model.model.layers)
    stored = [layer.mlp.up_proj.weight for layer in layers]
    stream_layers(model, layers, CPU, Casting(torch.bfloat16, torch.float32))
    for index in (0, 1, 2, 3, 0, 2, 2):  # as sweeps do, and out of order
        hidden = torch.zeros(1, 4, 32)
        position = model.model.rotary_emb(hidden, torch.arange(4)[None])
        layers[index](hidden, position_embeddings=position)
        cast = [layer.mlp.up_proj.weight.dtype == torch.float32 for layer in layers]
        assert cast == [n == index for n in range(4)]
        assert torch.equal(layers[index].mlp.up_proj.weight.to(torch.bfloat16), stored[index])
    assert layers[0].mlp.up_proj.weight is stored[0]


def test_a_layer_keeps_its_memory_until_the_next_ones_weights_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a GPU's copy would take it while it is still read: that copy was asked for before the layer was called."""
    layers = [nn.Linear(4, 4) for _ in range(3)]
    kept: list[bool] = []

    def move_slowly(host: torch.Tensor, *args: Any) -> torch.Tensor:
        time.sleep(0.02)
        before = [layer for index, layer in enumerate(layers) if index and layers[index].weight is host]
        kept.extend(layers[layers.index(layer) - 1].weight.dtype == torch.float64 for layer in before)
        return moved(host, *args)

    monkeypatch.setattr(streaming, "moved", move_slowly)
    LayerStream(layers, CPU, Casting(torch.float32, torch.float64))
    for layer in layers:
        layer(torch.zeros(1, 4, dtype=torch.float64))
    assert kept == [True, True]


def test_a_copy_that_failed_for_want_of_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(4, 4) for _ in range(3)]
    failures = [layers[1].weight, layers[2].bias]

    def fail_once(host: torch.Tensor, *args: Any) -> torch.Tensor:
        if any(host is each for each in failures):
            failures[:] = [each for each in failures if each is not host]
            raise torch.OutOfMemoryError("out of memory")
        return moved(host, *args)

    monkeypatch.setattr(streaming, "moved", fail_once)
    LayerStream(layers, CPU, Casting(torch.float32, torch.float64))
    for layer in (layers[0], layers[1], layers[0], layers[2]):
        assert layer(torch.zeros(1, 4, dtype=torch.float64)).dtype == torch.float64
    assert not failures


def test_a_streamed_model_of_the_files_dtype_is_used_where_it_is_mapped(tmp_path: Path) -> None:
    tiny_llama(torch.float32).save_pretrained(tmp_path)
    decoder = load_decoder(ModelSource(str(tmp_path)), "float32", Placement.STREAMED, [CPU])
    before = [layer.mlp.up_proj.weight.data_ptr() for layer in decoder.layers]  # type: ignore[union-attr]
    ForkedPass(decoder, CALL_SHAPE).window_sums(MASKS[:3], windows())
    decoder.layers[2](*_call(decoder))
    assert [layer.mlp.up_proj.weight.data_ptr() for layer in decoder.layers] == before  # type: ignore[union-attr]


def _call(decoder: Decoder) -> tuple[Any, ...]:
    hidden = torch.zeros(1, 4, 32)
    return (hidden, None, None, None, False, decoder.model.model.rotary_emb(hidden, torch.arange(4)[None]))


@cache
def on_fake_gpus(names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """What each architecture's sweeps came to on devices without data; made in a process of its own, since torch takes
    a made-up kind of device for good."""
    program = [sys.executable, "-m", "tests.engine.fake_gpus", *names]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("placement", ["sharded", "streamed"])
@pytest.mark.parametrize("names", [NAMES, pytest.param(MORE_NAMES, marks=pytest.mark.slow)], ids=["some", "others"])
def test_every_tensor_of_a_sweep_is_on_the_device_of_its_layer(names: tuple[str, ...], placement: str) -> None:
    assert {name: on_fake_gpus(names)[name][placement] for name in names} == dict.fromkeys(names, "on its devices")


def test_a_tensor_on_the_wrong_device_would_be_noticed() -> None:
    assert "found at least two devices" in on_fake_gpus(NAMES)["llama"]["mistaken"]


def test_a_layer_computes_after_its_copy_and_a_copy_waits_for_the_layer_before_it() -> None:
    diary = on_fake_gpus(NAMES)["diary"]["llama"].split(", ")
    mine = [entry for entry in diary if entry.startswith("computation")]
    # Each layer is waited for when it is due, and then the next one is sent for: the first one by the run before.
    assert mine == ["computation waits for copies", "computation recorded"] * 4
    copier = [entry for entry in diary if not entry.startswith("computation")]
    assert copier[:8] == ["copier waits for computation", "copies recorded"] * 4


@given(
    layers=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    outside=st.integers(0, 300),
    num_devices=st.integers(1, 8),
)
def test_layers_are_split_in_order_and_evenly(layers: list[int], outside: int, num_devices: int) -> None:
    sizes = ModelBytes(tuple(layers), outside)
    devices = split_layers(sizes, num_devices)
    assert devices == sorted(devices)
    assert set(devices) <= set(range(num_devices))
    assert sizes.on_device(Placement.SHARDED, num_devices) <= sizes.total / num_devices + max(layers) + outside
    assert sizes.on_device(Placement.SHARDED, 1) == sizes.on_device(Placement.RESIDENT) == sum(layers) + outside


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(("placement", "gpus"), [("resident", 2), ("streamed", 2), ("sharded", 1)])
def test_a_placement_that_contradicts_the_number_of_gpus_is_refused(placement: str, gpus: int, on_gpu: bool) -> None:
    with pytest.raises(UserError, match="`gpus_per_replica"):
        resolve_placement(
            placement, SIZES, 10**6, on_gpu=on_gpu, gpus_per_replica=gpus, gpus_per_node=4, working_bytes=1
        )


SIZES = ModelBytes(layers=(10,) * 40, outside=20)


@pytest.mark.parametrize(
    ("device_bytes", "devices_per_replica", "expected"),
    [
        (480, [1], (Placement.RESIDENT, 1)),
        (470, [1], (Placement.STREAMED, 1)),
        (470, [1, 2], (Placement.STREAMED, 1)),
        (60, [1], (Placement.STREAMED, 1)),
        (58, [1], None),
        (470, [2], (Placement.SHARDED, 2)),
        (250, [2], (Placement.SHARDED, 2)),
        (100, [2, 4], None),
        (58, [1, 2, 4, 8, 16], (Placement.SHARDED, 16)),
    ],
)
def test_the_placement_follows_from_sizes(
    device_bytes: int, devices_per_replica: list[int], expected: tuple[Placement, int] | None
) -> None:
    found = choose_placement(SIZES, device_bytes, devices_per_replica=devices_per_replica, working_bytes=4)
    assert found == expected
