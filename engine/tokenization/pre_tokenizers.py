"""How byte-level BPE vocabularies cut a text before merging, by the name that GGUF files give it.

A GGUF file names its rule in `tokenizer.ggml.pre`; the rules themselves are part of llama.cpp, which the format comes
from, and follow each model's published tokenizer.json.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

from engine.errors import UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizerRule(NamedTuple):
    """Expressions applied one after the other, each within the pieces of the one before.

    Attributes:
        patterns: what each matches becomes a piece of its own; the rest between matches too.
        ignore_merges: a piece that is a token as a whole is taken as it is, merges or not.
        add_bos: whether a leading BOS is usual, where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3_RULE = PreTokenizerRule((_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS_RULE = PreTokenizerRule((r"\p{N}", _GPT2))
_RULES = {
    "default": PreTokenizerRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizerRule((_GPT2,)),
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "qwen2": PreTokenizerRule((_QWEN2,)),
    "deepseek-r1-qwen": PreTokenizerRule((_QWEN2,)),
    "tekken": PreTokenizerRule((_TEKKEN,), ignore_merges=True, add_bos=True),
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "refact": _DIGITS_RULE,
    "command-r": _DIGITS_RULE,
}


def pre_tokenizer_rule(name: str, where: str) -> PreTokenizerRule:
    """The rule of that name; an unknown one is an UnsupportedModelError, as guessing would spoil the model's input."""
    if name not in _RULES:
        raise UnsupportedModelError(f"{where}: pre-tokenizer {name!r}", _RULES)
    return _RULES[name]


def build_pre_tokenizer(rule: PreTokenizerRule) -> pre_tokenizers.PreTokenizer:
    """The rule as a pre-tokenizer of the `tokenizers` library, ending in the byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
