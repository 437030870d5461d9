"""Tokenizers from GGUF metadata.

Two kinds: "gpt2", byte-level BPE with its merges listed, and "llama", SentencePiece BPE with a score for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.tokenization.from_huggingface import add_special_tokens_around
from engine.tokenization.pre_tokenizers import build_pre_tokenizer, pre_tokenizer_rule
from engine.tokenization.tokenizer import Tokenizer


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Build the tokenizer that a file's metadata describes.

    Args:
        where: the file, for errors.

    Raises:
        ModelLoadError, UnsupportedModelError: metadata is missing, inconsistent, or of another kind.
    """
    fields = _Fields(metadata, where)
    kind = fields.get("model", str)
    if kind == "gpt2":
        backend, add_bos = _byte_level(fields)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(fields), True
    else:
        raise UnsupportedModelError(f"{where}: tokenizer model {kind!r}", ["gpt2", "llama"])
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
            for token, kind in zip(fields.tokens, fields.types, strict=True)
            if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    special_tokens = _special_tokens(fields)
    flags = {"bos_token": add_bos, "eos_token": False}
    for role in flags:
        explicit = fields.get(f"add_{role}", bool)
        if explicit is not None:
            flags[role] = explicit
    bos, eos = (special_tokens.get(role) if flag else None for role, flag in flags.items())
    add_special_tokens_around(backend, bos, eos)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, special_tokens, template if isinstance(template, str) else None)


class _Fields:
    """The `tokenizer.ggml.*` metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self.where = where
        self.tokens: list[str] = self.array("tokens", str)
        types = self.array("token_type", int) if self.has("token_type") else [TokenType.NORMAL] * len(self.tokens)
        if len(types) != len(self.tokens):
            raise ModelLoadError(f"{where}: {len(types)} token types for {len(self.tokens)} tokens")
        self.types: list[int] = types

    def has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self._metadata

    def get(self, name: str, kind: type) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not isinstance(value, kind):
            raise ModelLoadError(
                f"{self.where}: metadata tokenizer.ggml.{name}={value!r} is not of type {kind.__name__}"
            )
        return value

    def array(self, name: str, kind: type) -> list[Any]:
        values = self._metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(values, list) or not values or not isinstance(values[0], kind):
            raise ModelLoadError(f"{self.where}: metadata tokenizer.ggml.{name} is missing or not {kind.__name__}s")
        return values


def _byte_level(fields: _Fields) -> tuple[tokenizers.Tokenizer, bool]:
    rule = pre_tokenizer_rule(fields.get("pre", str) or "default", fields.where)
    vocab = {token: i for i, token in enumerate(fields.tokens)}
    merges = [_split_merge(merge, fields.where) for merge in fields.array("merges", str)]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges)
    except Exception as error:  # the library raises bare Exception, e.g. for a merge of unknown tokens
        raise ModelLoadError(f"{fields.where}: tokenizer.ggml.merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = build_pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos


def _split_merge(merge: str, where: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelLoadError(f"{where}: tokenizer.ggml.merges: {merge!r} is not two tokens")
    return left, right


def _sentencepiece(fields: _Fields) -> tokenizers.Tokenizer:
    scores = fields.array("scores", float)
    if len(scores) != len(fields.tokens):
        raise ModelLoadError(f"{fields.where}: {len(scores)} scores for {len(fields.tokens)} tokens")
    unknown = fields.get("unknown_token_id", int) or 0
    model = models.BPE(
        vocab={token: i for i, token in enumerate(fields.tokens)},
        merges=_merges_from_scores(fields.tokens, fields.types, scores),
        unk_token=fields.tokens[unknown] if unknown < len(fields.tokens) else None,
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in fields.types,
    )
    backend = tokenizers.Tokenizer(model)
    prefix = fields.get("add_space_prefix", bool)
    add_prefix = prefix is None or prefix
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if add_prefix else [replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
    return backend


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest; as merges, every split of each token into two
    others, by falling score (and longer left parts first, as the unions are equal)."""
    normal = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == TokenType.NORMAL}
    merges = []
    for token, i in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((-scores[i], -cut, left, right))
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def _special_tokens(fields: _Fields) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special_tokens = {}
    for role, key in keys.items():
        token_id = fields.get(f"{key}_token_id", int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(fields.tokens):
            raise ModelLoadError(f"{fields.where}: tokenizer.ggml.{key}_token_id={token_id} is beyond the vocabulary")
        special_tokens[role] = fields.tokens[token_id]
    return special_tokens
