"""POST /v1/chat/completions: from its request to a generation, and from deltas to OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from typing import Any

from app.ingress.generation import ChoiceDelta, Generation
from app.ingress.logprobs import chat_logprobs
from app.ingress.models import ModelRegistry
from app.ingress.prompts import output_budget, render_chat, tokenize
from app.ingress.protocol import ChatCompletionRequest
from app.ingress.sse import Envelope, to_json
from engine.errors import RequestError
from engine.request import EngineRequest
from engine.sampling_params import MAX_LOGPROBS


async def chat_generation(registry: ModelRegistry, request: ChatCompletionRequest) -> Generation:
    """Template, tokenise and bound one conversation; RequestError names the parameter that cannot be served."""
    request.check_stream_options()
    model = registry.get(request.model)
    num_logprobs = request.requested_logprobs()
    if num_logprobs is not None and not 0 <= num_logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs={num_logprobs} must be an integer from 0 to {MAX_LOGPROBS}",
            param="top_logprobs",
            code="invalid_value",
        )
    text = render_chat(model, request)
    # The template writes the special tokens itself.
    token_ids = await tokenize(model.tokenizer, text, add_special_tokens=bool(request.add_special_tokens))
    requested, param = request.requested_max_tokens()
    max_tokens = output_budget(model, len(token_ids), requested, None, param=param, prompt="messages")
    engine_request = EngineRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt_token_ids=token_ids,
        sampling_params=request.sampling_params(max_tokens=max_tokens, logprobs=num_logprobs),
        cache_salt=request.cache_salt or "",
        adapter=model.adapter,
    )
    name = registry.answer_name(request.model, model)
    return Generation(model, [engine_request], continuation=False, name=name)


class ChatFormat:
    """Writes one chat completion, whole or as events."""

    def __init__(self, request: ChatCompletionRequest, generation: Generation) -> None:
        self._request = request
        self._generation = generation
        self._num_top = request.top_logprobs or 0
        engine_request = generation.requests[0]
        self._fields: dict[str, Any] = {
            "id": engine_request.request_id,
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": generation.name,
        }
        self._prompt_token_ids = list(engine_request.prompt_token_ids) if request.return_token_ids else None
        self._envelope = Envelope(
            self._fields, generation, include_usage=request.include_usage, continuous=request.continuous_usage
        )

    def start(self) -> bytes:
        """One event a choice that tells the role."""
        role = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        if self._prompt_token_ids is not None:
            role += b',"prompt_token_ids":' + to_json(self._prompt_token_ids)
        return b"".join(
            self._envelope.event(b'"index":%d' % index + role) for index in range(self._generation.num_choices)
        )

    def write(self, delta: ChoiceDelta) -> bytes:
        """The text's event, and one without text for the finish reason."""
        index = b'"index":%d' % delta.index
        logprobs = b"null" if not delta.logprobs else to_json(self._logprobs(delta))
        token_ids = b',"token_ids":' + to_json(delta.token_ids) if self._request.return_token_ids else b""
        events = b""
        if delta.text or delta.logprobs or (token_ids and delta.token_ids):
            content = b',"delta":{"content":' + to_json(delta.text) + b'},"logprobs":'
            events = self._envelope.event(index + content + logprobs + b',"finish_reason":null' + token_ids)
        if delta.finish_reason is not None:
            reason = b',"delta":{},"logprobs":null,"finish_reason":' + to_json(delta.finish_reason)
            events += self._envelope.event(index + reason + b',"stop_reason":' + to_json(delta.stop_reason))
        return events

    def usage(self) -> bytes:
        """The last event before the end mark, if asked for."""
        return self._envelope.usage()

    def whole(self, choices: list[ChoiceDelta]) -> dict[str, Any]:
        """The response object of a request without streaming."""
        body = {
            **self._fields,
            "choices": [self._choice(choice) for choice in choices],
            "usage": self._generation.usage.as_dict(),
            **self._generation.receipt_fields(),
        }
        if self._prompt_token_ids is not None:
            body["prompt_token_ids"] = self._prompt_token_ids
        return body

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        token_ids = {"token_ids": choice.token_ids} if self._request.return_token_ids else {}
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice) if self._request.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **token_ids,
        }

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any]:
        return chat_logprobs(delta.logprobs, self._generation.model.tokenizer, self._num_top)
