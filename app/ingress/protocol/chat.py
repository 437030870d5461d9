"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from app.ingress.protocol.base import RequestModel, invalid, no_op_only
from app.ingress.protocol.sampling import SamplingFields
from engine.errors import RequestError

# Set by the server, or about how the template is used: not for the template's own variables.
RESERVED_TEMPLATE_KWARGS = frozenset({"messages", "add_generation_prompt", "tools", "self"})


def _text(value: Any) -> str:
    """Message content as one string; content parts are joined as they stand."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid("must be a string or a list of text parts")
    return "".join(_part_text(index, part) for index, part in enumerate(value))


def _part_text(index: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise invalid(f'part {index} must be an object like {{"type": "text", "text": "..."}}')
    if kind != "text":
        raise invalid(f"part {index} has type {kind!r}, which is not supported: only text parts are")
    if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
        raise invalid(f"part {index} must have a string 'text' and nothing else")
    return str(part["text"])


class Message(RequestModel):
    """One message of a conversation. Roles that belong to tools come with tools."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None
    tool_calls: Annotated[Any, no_op_only([])] = None
    tool_call_id: Annotated[Any, no_op_only()] = None
    function_call: Annotated[Any, no_op_only()] = None
    audio: Annotated[Any, no_op_only()] = None
    refusal: Annotated[Any, no_op_only()] = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it; "developer" is OpenAI's newer name of "system"."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


class ChatTemplateFields(RequestModel):
    """What turns into a prompt; shared with /tokenize, so that both count the same tokens."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the template; RequestError if one would take the place of a parameter."""
        kwargs = self.chat_template_kwargs or {}
        if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
            raise RequestError(
                f"chat_template_kwargs must not hold {', '.join(reserved)}", param="chat_template_kwargs"
            )
        return kwargs


class ChatCompletionRequest(ChatTemplateFields, SamplingFields):
    """OpenAI's parameters and vLLM's extras; `max_completion_tokens` is the newer name of `max_tokens`."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    # Accepted: none asks for a behaviour that Quire could fail to show.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    audio: Annotated[Any, no_op_only()] = None
    function_call: Annotated[Any, no_op_only("none", "auto")] = None
    functions: Annotated[Any, no_op_only([])] = None
    modalities: Annotated[Any, no_op_only(["text"])] = None
    moderation: Annotated[Any, no_op_only()] = None
    parallel_tool_calls: Annotated[Any, no_op_only(True)] = None
    prediction: Annotated[Any, no_op_only()] = None
    prompt_cache_retention: Annotated[Any, no_op_only()] = None
    reasoning_effort: Annotated[Any, no_op_only("none")] = None
    response_format: Annotated[Any, no_op_only({"type": "text"})] = None
    service_tier: Annotated[Any, no_op_only("auto", "default")] = None
    store: Annotated[Any, no_op_only(False)] = None
    tool_choice: Annotated[Any, no_op_only("none", "auto")] = None
    tools: Annotated[Any, no_op_only([])] = None
    verbosity: Annotated[Any, no_op_only("medium")] = None
    web_search_options: Annotated[Any, no_op_only()] = None

    def requested_max_tokens(self) -> tuple[int | None, str]:
        """The bound on output tokens and the name it was given by; None if the request has none."""
        if self.max_completion_tokens is None:
            return self.max_tokens, "max_tokens"
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise RequestError(
                f"max_tokens={self.max_tokens} contradicts max_completion_tokens={self.max_completion_tokens}",
                param="max_tokens",
            )
        return self.max_completion_tokens, "max_completion_tokens"

    def requested_logprobs(self) -> int | None:
        """Most likely tokens to report at each position; None if no log-probabilities are asked for."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs=true", param="top_logprobs")
        return None
