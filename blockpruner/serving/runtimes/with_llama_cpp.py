"""Generates greedily in llama.cpp (xllamacpp), one prompt after the other."""

import json
import sys
import time

import xllamacpp

request = json.load(sys.stdin)
options = xllamacpp.CommonParams()
options.model.path = request["model"]
options.n_ctx = max(map(len, request["prompts"])) + request["num_tokens"]
options.n_parallel = 1
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = request["threads"]
options.warmup = False
options.verbosity = 0
# Otherwise the V cache is padded to the widest layer.
options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
server = xllamacpp.Server(options)


def generate(prompt, num_tokens):
    """Return what was generated: for each step the token, and the most likely tokens with log-probabilities."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "max_tokens": num_tokens,
            "n_probs": request["num_top"],
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    if "choices" not in answer:
        sys.exit(json.dumps(answer))
    steps = answer["choices"][0]["logprobs"]["content"]
    if len(steps) != num_tokens:
        sys.exit(f"expected {num_tokens} tokens, got {len(steps)}")
    return steps


def seconds(num_tokens):
    start = time.perf_counter()
    generate(request["prompts"][0], num_tokens)
    return time.perf_counter() - start


answers = [generate(prompt, request["num_tokens"]) for prompt in request["prompts"]]
tokens = [[step["id"] for step in steps] for steps in answers]
top = [[[(one["id"], one["logprob"]) for one in step["top_logprobs"]] for step in steps] for steps in answers]
times = [[seconds(1), seconds(request["num_tokens"])] for _ in range(request["repeats"])]
print("\n" + json.dumps({"version": xllamacpp.__version__, "tokens": tokens, "top": top, "seconds": times}))
