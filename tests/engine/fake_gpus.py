"""Sweeps on several GPUs that are not there: tensors with shapes and devices, but without data.

An operation between two devices fails as it does on real ones. Run as a program with the names of architectures; the
last line of stdout is JSON.
"""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM

from blockpruner.engine.blocks import NUM_GROUPS, Block, Kind, Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model import decoder, decoder_check, streaming
from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.sharding import shard_layers
from blockpruner.engine.model.streaming import stream_layers
from blockpruner.engine.model.weights import Casting, tensors_of
from blockpruner.engine.scoring import forked
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from tests.engine.architectures import NUM_LAYERS, ROWS, SHARED
from tests.engine.test_architectures import MASKS

NAMES = ("llama", "gemma2", "gpt_neox parallel", "gemma4 e2b")
MORE_NAMES = ("llama tied", "opt", "bloom", "mixtral")
"""One of each form of layer; the second ones take long for what they add. (Falcon and GPT-Neo cannot be faked: their
forwards copy a number to the device.)"""
CALL_SHAPE = CallShape(sequences_per_call=5, tokens_per_head_call=7)
CASTING = Casting(torch.float32, torch.bfloat16)


class FakeStream:
    """A CUDA stream that keeps a diary."""

    diary: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def record_event(self) -> "FakeStream":
        self.diary.append(f"{self.name} recorded")
        return self

    def wait_event(self, event: "FakeStream") -> None:
        self.diary.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.diary.append(f"copier waits for {self.name}")


class Torch:
    """torch, but its `tensor` makes one without data, since no fake device can copy numbers."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def allclose(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def tensor(self, values: Any, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(len(values), dtype=dtype)


class Copier:
    """Works at once: tensors without data cannot be made by two threads."""

    def __init__(self, num_threads: int, thread_name_prefix: str) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(work(*args))
        return future


@contextmanager
def entered(stream: FakeStream) -> Iterator[None]:
    yield


def sweep(name: str, placement: str, *, with_check: bool = True) -> str:
    model = AutoModelForCausalLM.from_config({**ROWS, "gemma4 e2b": SHARED}[name].make_config()).eval()
    for owner, buffer in tensors_of(model):
        if (value := owner._buffers.get(buffer)) is not None:  # some hold a number, which no fake device can copy
            owner._buffers[buffer] = torch.empty(value.shape, dtype=value.dtype)
    layers = list(model.get_submodule(architecture_of(model).layers))
    home = torch.device("gpu", 0)
    devices, layer_stream = [home] * NUM_LAYERS, None
    if placement == "streamed":
        layer_stream = stream_layers(model, layers, home, CASTING)
    else:
        devices = [torch.device("gpu", index) for index in (0, 0, 1, 2)]
        shard_layers(model, layers, devices, home, CASTING)
        if [next(layer.parameters()).device for layer in layers] != devices:
            return "layers lie elsewhere"
    decoder = Decoder(model, devices, layer_stream)
    if placement == "mistaken":  # the stream is left where it was
        layers[2].__dict__["forward"] = layers[2].forward.args[0]  # type: ignore[union-attr]
        decoder.layer_devices = [home] * NUM_LAYERS
    mlps = [block for block in decoder.narrow if block.kind is Kind.MLP]
    try:
        decoder.put_in_order(ChannelOrder({block: np.arange(8, dtype=np.int32) for block in mlps}))
        if placement != "mistaken" and with_check:
            check_removable(decoder)
        if not with_check:
            decoder.outputs  # noqa: B018 - learnt in a run of its own
            FakeStream.diary.clear()
        windows = torch.zeros(2, 12, dtype=torch.long, device=home)
        masks = [mask for mask in MASKS if not mask.absent & decoder.shape.needed]
        masks += [Mask.of([Block(Kind.MLP, block.layer, NUM_GROUPS)]) for block in mlps[-1:]]
        sums = ForkedPass(decoder, CALL_SHAPE).window_sums(masks, windows)
    except (RuntimeError, UserError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "on its devices" if sums.device == home and sums.shape == (len(masks), 2) else str(sums)


def main(names: list[str]) -> None:
    _setup_privateuseone_for_python_backend("gpu")
    torch.cuda.Stream = lambda device: FakeStream("copies")  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device: FakeStream("computation")  # type: ignore[assignment, return-value]
    torch.cuda.stream = entered  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment, method-assign]
    forked.torch = decoder.torch = decoder_check.torch = Torch(torch)  # type: ignore[attr-defined]
    streaming.ThreadPoolExecutor = Copier  # type: ignore[assignment, misc]
    with FakeTensorMode(), torch.no_grad():
        found = {name: {placement: sweep(name, placement) for placement in ("sharded", "streamed")} for name in names}
        found.setdefault("llama", {})["mistaken"] = sweep("llama", "mistaken")
        sweep("llama", "streamed", with_check=False)
        found["diary"] = {"llama": ", ".join(FakeStream.diary)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
