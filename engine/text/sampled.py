"""Text that a model writes: drawn token by token from its own next-token distributions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.engine.errors import SearchFailed, UserError


def start_token(tokenizer: PreTrainedTokenizerBase, start: str | None) -> int:
    """Return the id of the token that texts begin with. start: its text; None for BOS, or EOS if there is none.

    Raises UserError if there is no such token.
    """
    if start is not None:
        token = tokenizer.convert_tokens_to_ids(start)
        if token is None or (token == tokenizer.unk_token_id and start != tokenizer.unk_token):
            raise UserError(f"expected `start` to be one token of the tokenizer, got {start!r}.")
        return int(token)
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise UserError("expected `start`, since the tokenizer has neither a BOS nor an EOS token.")
    return int(token)


@torch.inference_mode()
def sampled_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: int,
    num_rows: int,
    num_tokens: int,
    batch_size: int,
    seed: int,
    on_row: Callable[[int], None] = lambda number: None,
) -> list[str]:
    """Draw texts of `num_tokens` tokens at temperature 1 from the whole distribution, without special tokens.

    The end of a document does not end a text. on_row: called after each batch with its number of texts. Raises
    SearchFailed if the model's distributions are not finite.
    """
    torch.manual_seed(seed)
    texts: list[str] = []
    own, model.generation_config = model.generation_config, GenerationConfig()  # its own may cut the distribution
    try:
        while len(texts) < num_rows:
            number = min(batch_size, num_rows - len(texts))
            ids = torch.full((number, 1), start, device=model.device)
            try:
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    eos_token_id=None,
                    pad_token_id=start,
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise SearchFailed("the model's distributions are not finite in this dtype; use float32.") from error
            texts += tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)
            on_row(number)
    finally:
        model.generation_config = own
    return texts
