"""Builds the tokenizer that a GGUF describes: the one that llama.cpp uses for it.

Built here rather than by transformers, which cuts text by GPT-2's rule where it does not know `tokenizer.ggml.pre`, and
leaves out what else the rule asks for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.from_gguf.header import Fields
from blockpruner.engine.model.from_gguf.keys import ADVICE, Keys
from blockpruner.engine.model.from_gguf.pre_tokenizers import PRE_TOKENIZERS

CONTROL, USER_DEFINED = 3, 4
"""Types of tokens (gguf.TokenType) that are found in the text before anything else."""
SPACE = "▁"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
"""Ids that a SentencePiece vocabulary has where the file names none."""
HARMLESS = ("token_id", "token_ids", "suppress_tokens", "token_type_count")
"""Ends of names of fields that matter only to who generates."""


def special_ids(fields: Fields, file: str) -> dict[str, int]:
    """Return the ids of the special tokens, as `bos_token`: 1."""
    keys = Keys(fields, "tokenizer.ggml.", file)
    size = len(_tokens(keys))
    ids = dict(SENTENCEPIECE_IDS) if keys.text("model") == "llama" else {}
    for name, short in SPECIAL.items():
        if keys.has(f"{short}_token_id"):
            ids[name] = keys.integer(f"{short}_token_id", least=0)
            if ids[name] >= size:
                raise keys.refuse(f"{short}_token_id", f"an id below {size}")
    return ids


def build_tokenizer(fields: Fields, file: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF. Raises UserError if it is of a kind that is not known here."""
    keys = Keys(fields, "tokenizer.ggml.", file)
    model = keys.text("model")
    if model not in ("gpt2", "llama"):
        raise keys.refuse("model", "'gpt2' or 'llama'")
    keys.only("add_sep_token", False)
    keys.only("remove_extra_whitespaces", False)
    tokens, kinds = _tokens(keys), _kinds(keys)
    ids = special_ids(fields, file)
    try:
        if model == "gpt2":
            tokenizer, adds_bos = _byte_level(keys, tokens)
        else:
            tokenizer, adds_bos = _sentencepiece(keys, tokens, kinds, ids)
        tokenizer.add_tokens(
            [
                AddedToken(text, normalized=False, special=kind == CONTROL)
                for text, kind in zip(tokens, kinds, strict=True)
                if kind in (CONTROL, USER_DEFINED) and not (model == "llama" and not text.strip(" "))
            ]
        )
    except UserError:
        raise
    except Exception as error:  # the tokenizers package raises this very class for what it cannot take
        raise UserError(f"cannot build the tokenizer of {file!r}: {first_line(error)[:200]}.") from error
    if tokenizer.get_vocab_size() != len(tokens):
        raise UserError(f"cannot build the tokenizer of {file!r}: its tokens cannot all be told apart.")
    adds_bos, adds_eos = keys.flag("add_bos_token", adds_bos), keys.flag("add_eos_token", False)
    _add_ends(keys, tokenizer, tokens, ids, adds_bos, adds_eos)
    left = [name for name in keys.left if not name.endswith(HARMLESS)]
    if left:
        raise UserError(f"expected a GGUF without the field {left[0]}, which is not known here, got {file!r}.")
    special = {name: tokens[index] for name, index in ids.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=Keys(fields, "tokenizer.", file).text("chat_template"),
        **special,
    )


def _tokens(keys: Keys) -> list[str]:
    tokens = keys.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"expected a GGUF with its tokenizer (tokenizer.ggml.tokens), got {keys.file!r} without.")
    named = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(named)) < len(named):
        twice = Counter(named).most_common(1)[0][0]
        raise UserError(f"expected different tokens in {keys.file!r}, got {twice[:40]!r} twice.")
    return named


def _numbers(keys: Keys, name: str, size: int) -> list[Any]:
    values = keys.get(name)
    if not isinstance(values, list) or len(values) != size or any(type(value) not in (int, float) for value in values):
        raise UserError(f"expected {size} numbers as {keys.prefix}{name} of {keys.file!r}, one for each token.")
    return values


def _kinds(keys: Keys) -> list[int]:
    size = len(_tokens(keys))
    return _numbers(keys, "token_type", size) if keys.has("token_type") else [1] * size


def _byte_level(keys: Keys, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Return a byte-level BPE tokenizer, and whether it adds BOS where the file does not say so."""
    name = keys.text("pre") or ""
    rule = PRE_TOKENIZERS.get(name)
    if rule is None:
        raise UserError(
            f"expected a GGUF with a tokenizer.ggml.pre that is known here ({', '.join(PRE_TOKENIZERS)}), got "
            f"{keys.file!r} with {name[:40]!r}: its text would be cut into other tokens; {ADVICE}."
        )
    keys.only("add_space_prefix", False)
    found = keys.get("merges")
    if not isinstance(found, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in found):
        raise UserError(f"expected pairs of tokens as {keys.prefix}merges of {keys.file!r}.")
    merges = [(merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]) for merge in found]
    keys.get("scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words))
    if (normalizer := rule.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = rule.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.adds_bos


def _sentencepiece(keys: Keys, tokens: list[str], kinds: list[int], ids: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Return a BPE tokenizer of SentencePiece, whose merges follow from the tokens' scores."""
    keys.text("pre")
    keys.get("merges")
    if keys.has("precompiled_charsmap"):
        raise keys.refuse("precompiled_charsmap", "nothing")
    scores = dict(zip(tokens, _numbers(keys, "scores", len(tokens)), strict=True))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == USER_DEFINED and not token.strip(" "):
            # Runs of spaces are found before all else. In the normalised text they are the first merges.
            written = SPACE * len(token)
            if written in vocabulary:
                raise UserError(f"expected different tokens in {keys.file!r}, got {written[:40]!r} in two spellings.")
            vocabulary[written] = vocabulary.pop(token)
            scores[written] = float(len(tokens) - vocabulary[written])
            del scores[token]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=tokens[ids["unk_token"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    pieces: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if keys.flag("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        pieces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer, True


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that form a token, those of the highest score first."""
    found = []
    for token, score in scores.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_ends(
    keys: Keys, tokenizer: Tokenizer, tokens: list[str], ids: dict[str, int], adds_bos: bool, adds_eos: bool
) -> None:
    """Let the tokenizer put BOS before each text and EOS after it."""
    ends = {name: (adds, ids.get(f"{name}_token")) for name, adds in (("bos", adds_bos), ("eos", adds_eos))}
    used = {}
    for name, (adds, index) in ends.items():
        if adds and index is None:
            raise UserError(f"expected {keys.prefix}{name}_token_id in {keys.file!r}, which adds that token to a text.")
        if adds and index is not None:
            used[name] = (tokens[index], index)
    if used:
        single = [*([used["bos"][0]] if "bos" in used else []), "$A", *([used["eos"][0]] if "eos" in used else [])]
        pair = [part.replace("$A", "$B") for part in single]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, *(f"{part}:1" for part in pair)], special_tokens=list(used.values())
        )
