"""What `serve-check` runs in a runtime's own Python: scripts that need nothing but that runtime.

Each reads one JSON object from stdin: `model` (path), `prompts` (lists of token ids), `num_tokens` (to generate),
`num_top` (log-probabilities of a step), `repeats` and, for vLLM, `backend`. Its last line on stdout is one JSON object:
`version`, `tokens` (one list a prompt), `top` (for each prompt and step, pairs of token id and log-probability, the
likeliest first) and `seconds` (of each repeated generation for the first prompt: [one token, all tokens]).
"""
