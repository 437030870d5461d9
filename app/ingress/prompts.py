"""From a request's text to token ids and an output budget that fits the model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from app.ingress.models import ServedModel
from app.ingress.protocol import ChatTemplateFields
from engine.errors import PromptTooLongError, RequestError
from engine.tokenization import Tokenizer

# Longer texts are tokenised in a thread: this many characters take about a millisecond of the event loop.
INLINE_CHARACTERS = 4096


def render_chat(model: ServedModel, request: ChatTemplateFields) -> str:
    """The conversation as the model's chat template writes it; RequestError if it has none or refuses the messages."""
    if not model.tokenizer.has_chat_template:
        raise RequestError(
            f"the model {model.id!r} has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    return model.tokenizer.apply_chat_template(
        [message.for_template() for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        **request.template_kwargs(),
    )


async def tokenize(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text; long ones off the event loop."""
    if len(text) <= INLINE_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def check_token_ids(tokenizer: Tokenizer, token_ids: Sequence[int], param: str) -> None:
    """RequestError if an id is not in the vocabulary."""
    if token_ids and max(token_ids) >= tokenizer.vocab_size:
        raise RequestError(
            f"{param} holds token id {max(token_ids)}; the vocabulary has {tokenizer.vocab_size}",
            param=param,
            code="invalid_value",
        )


def output_budget(
    model: ServedModel, num_prompt_tokens: int, requested: int | None, default: int | None, *, param: str, prompt: str
) -> int:
    """Output tokens at most: what is asked for, else `default`, else what fits into `max_model_len`.

    Args:
        param, prompt: names of the parameters that gave the bound and the prompt, for errors.

    Raises:
        RequestError: the bound is below 1.
        PromptTooLongError: the prompt leaves no room, or not enough for what is asked.
    """
    if requested is not None and requested < 1:
        raise RequestError(f"{param}={requested} must be at least 1", param=param, code="invalid_value")
    limit = model.max_model_len
    room = limit - num_prompt_tokens
    if room < 1:
        raise PromptTooLongError(
            f"the prompt has {num_prompt_tokens} tokens; {model.id!r} takes at most {limit} tokens, prompt and output",
            param=prompt,
            code="context_length_exceeded",
        )
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise PromptTooLongError(
            f"the prompt has {num_prompt_tokens} tokens and {param}={requested} asks for "
            f"{num_prompt_tokens + requested} in all; {model.id!r} takes at most {limit} tokens, prompt and output",
            param=param,
            code="context_length_exceeded",
        )
    return requested
