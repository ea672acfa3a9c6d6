"""A GPU that is not there, with data: tensors that compute in host memory, but say that they lie on a device.

An operation on tensors of both places fails as it does on a real GPU, and so does a conversion to numpy. Unlike in
fake_gpus.py numbers can be copied to the device and back, so that whole functions run. Run as a program with the names
of parts; the last line of stdout is JSON.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]  # a fake tensor cannot be an inference tensor

from transformers import PreTrainedModel  # noqa: E402

import blockpruner as bp  # noqa: E402
from blockpruner.engine.calibration import Windows  # noqa: E402
from blockpruner.engine.compensation.replica import TOKENS_PER_CALL  # noqa: E402
from blockpruner.engine.methods.block_influence import measure_influence  # noqa: E402
from blockpruner.engine.model.decoder import Decoder  # noqa: E402
from tests.conftest import random_windows, tiny_llama  # noqa: E402

_setup_privateuseone_for_python_backend("gpu")  # for good, so this is a program
HERE = torch.device("gpu", 0)
aten = torch.ops.aten
MIXING = (aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten._index_put_impl_)
"""Operations that take tensors of both places."""


class OnGpu(torch.Tensor):
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGpu":
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=HERE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert a tensor on a GPU to numpy")

    def tolist(self) -> Any:
        return self.held.tolist()


class Places(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packet, asked = func.overloadpacket, kwargs.get("device")
    known: dict[int, OnGpu] = {}
    on_cpu = False

    def inner(value: Any) -> Any:
        nonlocal on_cpu
        if isinstance(value, OnGpu):
            known[id(value.held)] = value
            return value.held
        on_cpu |= isinstance(value, torch.Tensor) and value.ndim > 0
        return [inner(one) for one in value] if isinstance(value, list | tuple) else value

    def outer(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return known[id(value)] if id(value) in known else OnGpu(value)
        return type(value)(map(outer, value)) if type(value) in (list, tuple) else value

    inside = [inner(value) for value in args], {name: inner(value) for name, value in kwargs.items()}
    if known and on_cpu and packet not in MIXING:
        raise RuntimeError(f"expected all tensors on one device, found two in {func}")
    if packet is aten._fused_sdp_choice:
        return 0  # attention in plain operations
    if asked is not None:
        inside[1]["device"] = torch.device("cpu")
    is_there = torch.device(asked).type == HERE.type if asked is not None else bool(known)
    if packet is aten.copy_ or packet is aten.index:
        is_there = isinstance(args[0], OnGpu)
    found = func(*inside[0], **inside[1])
    return outer(found) if is_there else found


def compensate(model: PreTrainedModel, text: Windows) -> str:
    small = bp.compensate(bp.prune(model, ["mha.1", "mlp.2"]), model, text, method="both", ridge=0.1)
    assert {weight.device for weight in small.parameters()} == {model.device}
    return f"{bp.perplexity(small, text):.6f}"


def influence(model: PreTrainedModel, text: Windows) -> str:
    found = measure_influence(Decoder(model), text.tokens).block_influence
    return ", ".join(f"{block} {value:.6f}" for block, value in found.items())


def search(model: PreTrainedModel, text: Windows, **options: Any) -> str:
    return str(bp.search(model, text, num_remove=1, **options).order)


def mistaken(model: PreTrainedModel, text: Windows) -> str:
    model.model.layers[1].cpu()
    return search(model, text)


PARTS: dict[str, Callable[[PreTrainedModel, Windows], str]] = {
    "compensate": compensate,
    "influence": influence,
    "kl": partial(search, metric="kl"),
    "channels": partial(search, units="channels"),
    "refits": partial(search, compensate=True),
    "mistaken": mistaken,
}


def attempt(name: str, model: PreTrainedModel) -> str:
    text = Windows(tokens=random_windows(), num_rows=1)
    try:
        return PARTS[name](model, text)
    except (RuntimeError, bp.UserError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    found = {name: [attempt(name, tiny_llama())] for name in names}
    TOKENS_PER_CALL[HERE.type] = TOKENS_PER_CALL["cpu"]
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment, method-assign]
    make = torch.tensor
    torch.tensor = lambda *values, device=None, **options: make(*values, **options).to(device or "cpu")  # type: ignore[assignment]
    with Places():
        for name in names:
            found[name].append(attempt(name, tiny_llama().to(HERE)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
