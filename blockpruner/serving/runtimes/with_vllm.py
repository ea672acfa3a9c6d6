"""Generates greedily in vLLM, with all prompts in one batch."""

import json
import os
import sys
import time

request = json.load(sys.stdin)
for name, value in (
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("OMP_NUM_THREADS", str(request["threads"])),
):
    os.environ.setdefault(name, value)

import vllm

model = vllm.LLM(
    request["model"],
    trust_remote_code=True,
    dtype=request["dtype"],
    model_impl=request["backend"],
    max_model_len=max(map(len, request["prompts"])) + request["num_tokens"],
    max_num_seqs=len(request["prompts"]),
    enforce_eager=True,
    enable_prefix_caching=False,
    skip_tokenizer_init=True,
    seed=0,
)


def generate(prompts, num_tokens, logprobs=None):
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in model.generate(inputs, sampling, use_tqdm=False)]


def seconds(num_tokens):
    start = time.perf_counter()
    generate(request["prompts"][:1], num_tokens)
    return time.perf_counter() - start


def likeliest(step):
    pairs = sorted(((token, entry.logprob) for token, entry in step.items()), key=lambda pair: -pair[1])
    return pairs[: request["num_top"]]


answers = generate(request["prompts"], request["num_tokens"], request["num_top"])
tokens = [list(answer.token_ids) for answer in answers]
top = [[likeliest(step) for step in answer.logprobs] for answer in answers]
times = [[seconds(1), seconds(request["num_tokens"])] for _ in range(request["repeats"])]
print("\n" + json.dumps({"version": vllm.__version__, "tokens": tokens, "top": top, "seconds": times}))
