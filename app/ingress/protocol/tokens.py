"""The bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from app.ingress.protocol.base import RequestModel, invalid, is_token_id
from app.ingress.protocol.chat import ChatTemplateFields


class TokenizePrompt(RequestModel):
    """Text to tokenise. `model` may be left out where only one is served."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeMessages(ChatTemplateFields):
    """A conversation to tokenise; the template brings its own special tokens."""

    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(is_token_id(item) for item in value):
        raise invalid("must be a list of token ids")
    return value


class DetokenizeRequest(RequestModel):
    """Token ids to turn into text, special tokens included."""

    model: str | None = None
    tokens: Annotated[Any, AfterValidator(_token_ids)]
