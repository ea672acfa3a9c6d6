"""Generates greedily in transformers, with the code in the folder, in one left-padded batch."""

import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

request = json.load(sys.stdin)
torch.set_num_threads(request["threads"])
transformers.logging.set_verbosity_error()
model = AutoModelForCausalLM.from_pretrained(
    request["model"], dtype=getattr(torch, request["dtype"]), trust_remote_code=True, use_safetensors=True
).eval()
# As in every runtime here: no penalties or filters that the folder asks for, and no stop at the end token.
model.generation_config = transformers.GenerationConfig()


def generate(prompts, num_tokens):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def seconds(num_tokens):
    start = time.perf_counter()
    generate(request["prompts"][:1], num_tokens)
    return time.perf_counter() - start


answer = generate(request["prompts"], request["num_tokens"])
tokens = answer.sequences[:, -request["num_tokens"] :].tolist()
steps = [logits.float().log_softmax(-1).topk(request["num_top"]) for logits in answer.logits]
top = [
    [list(zip(step.indices[row].tolist(), step.values[row].tolist(), strict=True)) for step in steps]
    for row in range(len(tokens))
]
times = [[seconds(1), seconds(request["num_tokens"])] for _ in range(request["repeats"])]
print("\n" + json.dumps({"version": transformers.__version__, "tokens": tokens, "top": top, "seconds": times}))
