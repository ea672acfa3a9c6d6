"""File sizes and tokens/s of a dense and a pruned model, in the runtimes that are installed.

    python -m benchmarks.serving --transformers DENSE PRUNED --vllm DENSE PRUNED --llama-cpp dense.gguf pruned.gguf \\
        --python llama-env/bin/python --python vllm-env/bin/python

PRUNED is what `blockpruner export` wrote (a folder for transformers and vLLM). Processes of the two models alternate,
and each generates several times. The fastest time counts, because other load on the machine can only add time.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import print_json, print_table
from blockpruner.engine.checkpoint.format import TRANSFORMERS, Runtime
from blockpruner.engine.checkpoint.formats.gguf import Gguf
from blockpruner.serving.serve_check import has_module, run_runtime

(LLAMA_CPP,) = Gguf.runtimes
VLLM = Runtime("vLLM", "vllm", "with_vllm.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("transformers", "vllm", "llama-cpp"):
        parser.add_argument(f"--{name}", nargs=2, metavar=("DENSE", "PRUNED"), type=Path)
    parser.add_argument("--python", action="append", default=[], help="Python of another environment; may be repeated")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--num-tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=3, help="number of generations per process")
    parser.add_argument("--rounds", type=int, default=2, help="number of processes per model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="dtype for transformers and vLLM")
    options = parser.parse_args()
    if not (options.transformers or options.vllm or options.llama_cpp):
        parser.error("expected --transformers, --vllm or --llama-cpp, each with DENSE and PRUNED")
    request = {
        # Which tokens they are makes no difference to speed.
        "prompts": [random.Random(0).choices(range(5, 1000), k=options.prompt_len)],
        "num_tokens": options.num_tokens, "num_top": 1, "repeats": options.repeats, "dtype": options.dtype,
        "threads": options.threads, "backend": "auto",
    }  # fmt: skip
    rows, figures = [], {}
    for runtime, models in (
        (TRANSFORMERS, options.transformers),
        (LLAMA_CPP, options.llama_cpp),
        (VLLM, options.vllm),
    ):
        if models is None:
            continue
        python = next((path for path in (sys.executable, *options.python) if has_module(path, runtime.module)), None)
        if python is None:
            rows.append([runtime.name, "not installed", "", "", ""])
            continue
        found = _measure(python, runtime, models, request, options.rounds)
        figures[runtime.name] = found
        for name, key in (("file, MiB", "mib"), ("prefill, tokens/s", "prefill"), ("decoding, tokens/s", "decode")):
            dense, pruned = found["dense"][key], found["pruned"][key]
            rows.append([runtime.name, name, f"{dense:.1f}", f"{pruned:.1f}", f"{pruned / dense:.2f}"])
    print_table("Serving", ["runtime", "", "dense", "pruned", "pruned / dense"], rows)
    print_json({name: request[name] for name in ("num_tokens", "dtype", "threads", "repeats")} | figures)


def _measure(
    python: str, runtime: Runtime, models: list[Path], request: dict[str, Any], rounds: int
) -> dict[str, dict[str, Any]]:
    times: dict[str, list[list[float]]] = {"dense": [], "pruned": []}
    version = ""
    for _ in range(rounds):
        for name, model in zip(times, models, strict=True):
            answer = run_runtime(python, runtime, {**request, "model": str(model.resolve())})
            times[name] += answer["seconds"]
            version = answer["version"]
    found: dict[str, dict[str, Any]] = {}
    for name, model in zip(times, models, strict=True):
        files = [model] if model.is_file() else list(model.glob("*.safetensors"))
        first = min(one for one, _ in times[name])
        rest = min(whole - one for one, whole in times[name])
        found[name] = {
            "version": version,
            "mib": sum(file.stat().st_size for file in files) / 2**20,
            "prefill": len(request["prompts"][0]) / first,
            "decode": (request["num_tokens"] - 1) / rest,
        }
    return found


if __name__ == "__main__":
    main()
