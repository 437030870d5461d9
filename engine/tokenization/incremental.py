"""Text from a stream of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from engine.tokenization.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Releases text as soon as its UTF-8 is whole; all pieces together equal `Tokenizer.decode` of all tokens.

    Args:
        continuation: as in `Tokenizer.decode`: the tokens continue a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._strip_next = tokenizer.strips_leading_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_partial = False  # the decoder holds the beginning of a character

    def append(self, token_ids: Iterable[int]) -> str:
        """The text that the tokens complete; may be empty."""
        return "".join(map(self.push, token_ids))

    def push(self, token_id: int) -> str:
        """As `append`, for one token: almost every one is whole characters, whose text the tokenizer remembers."""
        tokenizer = self._tokenizer
        if self._skip_special_tokens and tokenizer.is_special(token_id):
            return ""
        text = None if self._is_partial else tokenizer.whole_text(token_id)
        if text is None:
            text = self._utf8.decode(tokenizer.token_bytes(token_id))
            self._is_partial = bool(self._utf8.getstate()[0])
        return self._release(text) if self._strip_next else text

    def flush(self) -> str:
        """What an incomplete character at the end decodes to (U+FFFD), or ""."""
        return self._release(self._utf8.decode(b"", final=True))

    def _release(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text
