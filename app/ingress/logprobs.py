"""Log-probabilities in OpenAI's two styles: a list of objects for chat, parallel lists for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.ingress.generation import ReportedToken
from engine.tokenization import Tokenizer


def chat_logprobs(tokens: Sequence[ReportedToken], tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """`choice.logprobs` of a chat completion."""
    return {
        "content": [
            {
                **_token(tokenizer, token.token_id, token.logprobs.logprob),
                "top_logprobs": [_token(tokenizer, *pair) for pair in token.logprobs.top[:num_top]],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[ReportedToken], tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """`choice.logprobs` of a completion.

    The drawn token is among the most likely ones always, so there may be `num_top + 1`, as OpenAI has it.
    """
    return {
        "tokens": [tokenizer.token_text(token.token_id) for token in tokens],
        "token_logprobs": [token.logprobs.logprob for token in tokens],
        "top_logprobs": [_top(token, tokenizer, num_top) for token in tokens] if num_top else None,
        "text_offset": [token.text_offset for token in tokens],
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    # A token may be part of a character only; its bytes are exact.
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def _top(token: ReportedToken, tokenizer: Tokenizer, num_top: int) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, logprob in (*token.logprobs.top[:num_top], (token.token_id, token.logprobs.logprob)):
        # Two tokens can look the same; the likelier comes first and stays.
        top.setdefault(tokenizer.token_text(token_id), logprob)
    return top
