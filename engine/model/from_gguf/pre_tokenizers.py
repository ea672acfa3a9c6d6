"""How byte-level tokenizers cut text into words, by the names that llama.cpp has for it (src/llama-vocab.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARK, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
DIGITS = r"\p{N}"
LLAMA3 = rf"{_CONTRACTION}|{_MARK}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
QWEN2 = rf"{_CONTRACTION}|{_MARK}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
TEKKEN = (
    rf"{_MARK}{_UPPER}*{_LOWER}+|{_MARK}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)  # fmt: skip
GPT4O = (
    rf"{_MARK}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_MARK}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    split: str | None = None
    """The regular expression that text is split by at first; None for that of GPT-2 alone."""
    then_gpt2: bool = False
    """Whether the pieces are split by GPT-2's expression too."""
    whole_words: bool = False
    """Whether a word that is a token is taken without merging."""
    adds_bos: bool = False
    """Whether BOS is added where the file does not say so."""
    composes: bool = False
    """Whether text is brought to Unicode's form NFC first, as the tokenizer's original does."""

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.composes else None

    def build(self) -> pre_tokenizers.PreTokenizer:
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.split is None or self.then_gpt2)
        if self.split is None:
            return by_bytes
        if self.split == DIGITS:
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(self.split), behavior="isolated"), by_bytes])


_LLAMA3 = PreTokenizer(split=LLAMA3, whole_words=True, adds_bos=True)
_DIGITS = PreTokenizer(split=DIGITS, then_gpt2=True)

PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "phi-2": PreTokenizer(),
    "olmo": PreTokenizer(composes=True),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": PreTokenizer(split=LLAMA3),
    "smaug-bpe": PreTokenizer(split=LLAMA3),
    "qwen2": PreTokenizer(split=QWEN2, composes=True),
    "deepseek-r1-qwen": PreTokenizer(split=QWEN2),
    "stablelm2": PreTokenizer(split=QWEN2),
    "tekken": PreTokenizer(split=TEKKEN, whole_words=True, adds_bos=True),
    "gpt-4o": PreTokenizer(split=GPT4O),
}
