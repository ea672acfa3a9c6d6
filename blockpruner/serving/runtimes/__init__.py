"""Scripts that `serve-check` runs with the Python of a runtime. They need only that runtime.

Each script reads one JSON object from stdin: `model` (path), `prompts` (lists of token ids), `num_tokens` (to
generate), `num_top` (log-probabilities per step), `repeats` and, for vLLM, `backend`. The last line of stdout is one
JSON object: `version`, `tokens` (one list per prompt), `top` (pairs of token id and log-probability for each prompt and
step, most likely first) and `seconds` ([one token, all tokens] for each repeated generation of the first prompt).
"""
