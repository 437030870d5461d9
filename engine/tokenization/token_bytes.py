"""The bytes that each token stands for.

Every tokenizer of the supported models spells bytes: "byte-level" BPE writes each byte as a printable character,
SentencePiece writes text with "▁" for spaces and falls back to tokens like "<0xE2>". Text is then the UTF-8 of all
tokens' bytes, which makes streaming exact: a piece of text is released as soon as its bytes are whole.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from engine.errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # "▁"
_SUPPORTED = ("ByteLevel", "Sequence of Replace, ByteFallback, Fuse and Strip", "Metaspace")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


class TokenBytes:
    """Bytes of token ids, read from a tokenizer's decoder.

    Attributes:
        strips_leading_space: decoding a text from its start drops one leading space, which the normaliser added.

    Raises:
        UnsupportedModelError: the decoder is of another kind.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._memo: dict[int, bytes] = {}
        parts = _flatten(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
        kinds = [part["type"] for part in parts]
        self._byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        self.strips_leading_space = any(_strips(part) for part in parts)
        if not parts or not (self._byte_level or all(_is_sentencepiece(part) for part in parts)):
            raise UnsupportedModelError(f"token decoder {' + '.join(kinds) or 'None'}", _SUPPORTED)

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id that the vocabulary lacks (models pad theirs)."""
        spelled = self._memo.get(token_id)
        if spelled is None:
            token = self._backend.id_to_token(token_id)
            spelled = self._memo[token_id] = b"" if token is None else self._spell(token)
        return spelled

    def _spell(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in token])
            except KeyError:  # an added token, stored as plain text
                return token.encode()
        match = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if match is not None:
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for child in decoder["decoders"] for part in _flatten(child)]


def _strips(part: dict[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return bool(part.get("prepend_scheme") != "never" and part.get("add_prefix_space", True))
    return bool(part["type"] == "Strip")


def _is_sentencepiece(part: dict[str, Any]) -> bool:
    kind = part["type"]
    if kind == "Replace":
        return bool(part["pattern"] == {"String": _SPACE} and part["content"] == " ")
    if kind == "Strip":
        return bool(part["content"] == " " and part["start"] == 1 and part["stop"] == 0)
    if kind == "Metaspace":
        return bool(part["replacement"] == _SPACE)
    return kind in ("ByteFallback", "Fuse")
