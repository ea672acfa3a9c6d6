"""Measure how fast a model generates with a KV cache, and how much memory that takes."""

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

from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.sections import ModelSource

Speeds = dict[str, float]
"""Speeds of one generation, over all prompts of the batch.

prefill_tokens_per_s: prompt tokens / time to the first new token. Only the last position of a prompt goes through the
vocabulary head. decode_tokens_per_s: new tokens after the first ones / remaining time. generate_N_s: total time for N
new tokens.
"""

Memory = dict[str, int | None]
"""Memory figures of a model, in bytes; None if a figure cannot be measured on this machine."""


class Generation:
    """A model with a workload. Each call runs one generation."""

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
    """A streamer that records when `generate` passes it the prompt and each token. `generate` passes a token once it is
    on the host, so no extra synchronisation with the device is needed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_in_turn(
    models: Sequence[Callable[[], Speeds]], repeats: int, done: Callable[[], None] = lambda: None
) -> list[list[Speeds]]:
    """Measure each model `repeats` times. The models take turns, so that a drift in the machine's speed affects all
    equally. The first round is a warm-up and does not count. `done` is called after each generation."""
    rounds: list[list[Speeds]] = []
    for _ in range(repeats + 1):
        rounds.append([])
        for model in models:
            rounds[-1].append(model())
            done()
    return [list(speeds) for speeds in zip(*rounds[1:], strict=True)]


def generated_tokens_per_s(models: Sequence[PreTrainedModel], workload: Workload, *, repeats: int) -> list[float]:
    """Return the median of new tokens per second of each model in this process, including prefill."""
    speeds = generate_in_turn([Generation(model, workload) for model in models], repeats)
    num_tokens = workload.batch_size * workload.num_tokens
    return [num_tokens / statistics.median(found[workload.generate_s] for found in of_model) for of_model in speeds]


def kv_cache_bytes_per_token(model: PreTrainedModel) -> int | None:
    """Return the bytes by which the KV cache of one sequence grows per token, or None if the model has no such cache.

    The growth is measured at the second token, because layers with a sliding window stop growing at their window.
    """
    sizes = []
    for num_tokens in (1, 2):
        ids = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        if not hasattr(cache, "layers"):
            return None
        # Layers with linear attention hold a state of constant size instead of keys.
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
    return sizes[1] - sizes[0]


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process, including loading.

    On a GPU this is the memory of tensors. On a CPU it is resident memory, which includes Python, its libraries, and
    the touched pages of mapped weight files; None on systems without /proc.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # ru_maxrss would include the memory of the parent process
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def weights_bytes(source: ModelSource) -> int:
    """Return the size of the weight files of a folder or of a downloaded hub model."""
    folder = Path(cached_file(source.name, "config.json", revision=source.revision)).parent
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def memory(model: PreTrainedModel, source: ModelSource) -> Memory:
    """Measure the memory. Call it after the generations, in a process that has held no other model."""
    return {
        "peak_memory_bytes": peak_memory_bytes(model.device),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(model),
        "weights_bytes": weights_bytes(source),
    }


@dataclass(frozen=True)
class Measured:
    """All measurements of one model."""

    rounds: list[Speeds]
    memory: Memory

    def summary(self) -> dict[str, Any]:
        """Return the median of each speed, its first and third quartiles in `spread` (None after a single round), and
        the memory."""
        return {**_medians(self.rounds), **self.memory}

    def relative_to(self, dense: Measured) -> dict[str, Any]:
        """Return the same summary for ratios: this model's figures / those of the dense model. Speeds are divided round
        by round, so that a slow machine in some rounds cancels out."""
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
