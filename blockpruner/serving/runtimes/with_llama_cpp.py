"""Generates greedily in llama.cpp (llama-cpp-python), one prompt after the other."""

import json
import sys
import time

import llama_cpp
import numpy as np

request = json.load(sys.stdin)
model = llama_cpp.Llama(
    request["model"],
    n_ctx=max(map(len, request["prompts"])) + request["num_tokens"],
    n_threads=request["threads"],
    n_threads_batch=request["threads"],
    flash_attn=True,  # otherwise the V cache is padded to the widest layer
    verbose=False,
)


def generate(prompt, num_tokens):
    """Return the tokens, and log-probabilities [num_tokens, vocabulary]."""
    model.reset()
    model.eval(prompt)
    tokens, steps = [], []
    while True:
        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, (model.n_vocab(),)).astype(np.float64)
        tokens.append(int(logits.argmax()))
        logits -= logits.max()
        steps.append(logits - np.log(np.exp(logits).sum()))
        if len(tokens) == num_tokens:
            return tokens, steps
        model.eval(tokens[-1:])


def seconds(num_tokens):
    start = time.perf_counter()
    generate(request["prompts"][0], num_tokens)
    return time.perf_counter() - start


def likeliest(step):
    return [(int(token), float(step[token])) for token in np.argsort(-step)[: request["num_top"]]]


answers = [generate(prompt, request["num_tokens"]) for prompt in request["prompts"]]
tokens = [tokens for tokens, _ in answers]
top = [[likeliest(step) for step in steps] for _, steps in answers]
times = [[seconds(1), seconds(request["num_tokens"])] for _ in range(request["repeats"])]
print("\n" + json.dumps({"version": llama_cpp.__version__, "tokens": tokens, "top": top, "seconds": times}))
