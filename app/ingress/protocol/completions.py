"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from app.ingress.protocol.base import invalid, is_token_id, no_op_only
from app.ingress.protocol.sampling import SamplingFields
from engine.errors import RequestError

MAX_PROMPTS = 1024

Prompt = str | tuple[int, ...]


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise invalid("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if all(is_token_id(item) for item in value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS:
        raise invalid(f"holds {len(value)} prompts; at most {MAX_PROMPTS} are allowed")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    for index, item in enumerate(value):
        if not isinstance(item, list) or not item or not all(is_token_id(token_id) for token_id in item):
            raise invalid(f"entry {index} must be a string or a list of token ids, and all entries of one kind")
    return tuple(tuple(item) for item in value)


class CompletionRequest(SamplingFields):
    """OpenAI's parameters and vLLM's extras."""

    prompt: Annotated[Any, AfterValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None

    metadata: dict[str, str] | None = None

    service_tier: Annotated[Any, no_op_only("auto", "default")] = None
    store: Annotated[Any, no_op_only(False)] = None
    suffix: Annotated[Any, no_op_only("")] = None

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.prompt  # type: ignore[no-any-return]

    def check_supported(self) -> None:
        """RequestError for parameters that do not go together here."""
        if self.echo and self.logprobs is not None:
            raise RequestError("echo with logprobs is not supported yet", param="echo")
