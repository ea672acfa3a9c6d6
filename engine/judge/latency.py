"""How fast a model generates with KV cache, and what memory that takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from blockpruner.engine.model.loading import ModelSource


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is generated, greedily."""

    prompt_len: int = 512
    """Tokens of a prompt. They are random, and the same for all models of one vocabulary."""
    num_tokens: int = 128
    """Tokens generated after each prompt, at least 2; an end-of-text token ends nothing."""
    batch_size: int = 1
    """Prompts side by side."""
    static_cache: bool = False
    """A KV cache of fixed size. On a GPU transformers then compiles the decoding step into CUDA graphs."""

    @property
    def generate_s(self) -> str:
        """Name of the time of a whole generation."""
        return f"generate_{self.num_tokens}_s"


Speeds = dict[str, float]
"""Of one generation, all prompts of the batch together.

prefill_tokens_per_s: prompt tokens / time to the first new token; in generation only the last position of a prompt goes
through the vocabulary head. decode_tokens_per_s: new tokens after the first ones / the rest of the time. generate_N_s:
time of the whole, for N new tokens.
"""

Memory = dict[str, int | None]
"""Of a model, in bytes; None: it cannot be measured here."""


class Generation:
    """A model under a workload. A call generates once."""

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self.model = model
        self.workload = workload
        vocabulary = model.get_input_embeddings().num_embeddings
        shape = (workload.batch_size, workload.prompt_len)
        self._prompts = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(model.device)

    @torch.inference_mode()
    def __call__(self) -> Speeds:
        clock = _Clock()
        options = {"cache_implementation": "static"} if self.workload.static_cache else {}
        start = time.perf_counter()
        self.model.generate(
            self._prompts,
            attention_mask=torch.ones_like(self._prompts),
            min_new_tokens=self.workload.num_tokens,
            max_new_tokens=self.workload.num_tokens,
            do_sample=False,
            streamer=clock,
            **options,
        )
        _, first, *others = clock.times
        assert len(others) == self.workload.num_tokens - 1
        return {
            "prefill_tokens_per_s": self._prompts.numel() / (first - start),
            "decode_tokens_per_s": self.workload.batch_size * len(others) / (others[-1] - first),
            self.workload.generate_s: others[-1] - start,
        }


class _Clock:
    """A streamer that notes when `generate` hands over the prompt, and then each token. A token is handed over once it
    is on the host, so there is no other waiting for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_in_turn(
    models: Sequence[Callable[[], Speeds]], repeats: int, done: Callable[[], None] = lambda: None
) -> list[list[Speeds]]:
    """`repeats` speeds of each model. The models take turns, so that a drift of the machine's speed meets all alike;
    the first round warms up and does not count. `done` is called after each generation."""
    rounds: list[list[Speeds]] = []
    for _ in range(repeats + 1):
        rounds.append([])
        for model in models:
            rounds[-1].append(model())
            done()
    return [list(speeds) for speeds in zip(*rounds[1:], strict=True)]


def generated_tokens_per_s(models: Sequence[PreTrainedModel], workload: Workload, *, repeats: int) -> list[float]:
    """Median new tokens per second of models in this process, prefill included."""
    speeds = generate_in_turn([Generation(model, workload) for model in models], repeats)
    num_tokens = workload.batch_size * workload.num_tokens
    return [num_tokens / statistics.median(found[workload.generate_s] for found in of_model) for of_model in speeds]


def kv_cache_bytes_per_token(model: PreTrainedModel) -> int | None:
    """Bytes of keys and values by which the KV cache of one sequence grows with a token; None without such a cache.

    The second token's growth is measured: layers with a sliding window keep no more tokens than their window.
    """
    sizes = []
    for num_tokens in (1, 2):
        ids = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        if not hasattr(cache, "layers"):
            return None
        # Layers of linear attention hold a state of constant size instead of keys.
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
    return sizes[1] - sizes[0]


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory that this process has had, loading included. On a GPU: of tensors. On a CPU: resident, so Python, its
    libraries, and the pages of mapped weight files that were touched count too; None where there is no /proc."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # ru_maxrss would begin with what the parent process had
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def weights_bytes(source: ModelSource) -> int:
    """Size of the weight files of a folder, or of what was downloaded of a hub id."""
    folder = Path(cached_file(source.name, "config.json", revision=source.revision)).parent
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def memory(model: PreTrainedModel, source: ModelSource) -> Memory:
    """To be taken after the generations, in a process that held no other model."""
    return {
        "peak_memory_bytes": peak_memory_bytes(model.device),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(model),
        "weights_bytes": weights_bytes(source),
    }


@dataclass(frozen=True)
class Measured:
    """All that was measured of a model."""

    rounds: list[Speeds]
    memory: Memory

    def summary(self) -> dict[str, Any]:
        """The median of each speed, its first and third quartile in `spread` (None after a single round), and the
        memory."""
        return {**_medians(self.rounds), **self.memory}

    def relative_to(self, dense: Measured) -> dict[str, Any]:
        """The same of this model's figures / the dense model's. The ratios are those of each round with itself, so that
        what slowed the machine down in some of them falls out."""
        pairs = zip(self.rounds, dense.rounds, strict=True)
        sizes = {name: (size, dense.memory[name]) for name, size in self.memory.items()}
        return {
            **_medians([{name: value / base[name] for name, value in speeds.items()} for speeds, base in pairs]),
            **{name: None if size is None or not base else size / base for name, (size, base) in sizes.items()},
        }


def _medians(rounds: Sequence[Speeds]) -> dict[str, Any]:
    columns = {name: [speeds[name] for speeds in rounds] for name in rounds[0]}
    return {
        **{name: statistics.median(values) for name, values in columns.items()},
        "spread": {name: _quartiles(values) for name, values in columns.items()},
    }


def _quartiles(values: list[float]) -> list[float] | None:
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]
