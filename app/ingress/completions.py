"""POST /v1/completions: from its request to a generation, and from deltas to OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from typing import Any

from app.ingress.generation import ChoiceDelta, Generation
from app.ingress.logprobs import completion_logprobs
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.prompts import check_token_ids, output_budget, tokenize
from app.ingress.protocol import CompletionRequest
from app.ingress.protocol.completions import Prompt
from app.ingress.sse import Envelope, to_json
from engine.errors import RequestError
from engine.request import EngineRequest

# OpenAI's default for completions; chat has none.
DEFAULT_MAX_TOKENS = 16


async def completion_generation(registry: ModelRegistry, request: CompletionRequest) -> Generation:
    """Tokenise and bound each prompt; RequestError names the parameter that cannot be served."""
    request.check_supported()
    request.check_stream_options()
    model = registry.get(request.model)
    identifier = f"cmpl-{uuid.uuid4().hex}"
    return Generation(
        model,
        [
            await _engine_request(model, request, prompt, identifier if index == 0 else f"{identifier}-{index}")
            for index, prompt in enumerate(request.prompts)
        ],
        continuation=True,
        name=registry.answer_name(request.model, model),
    )


async def _engine_request(
    model: ServedModel, request: CompletionRequest, prompt: Prompt, request_id: str
) -> EngineRequest:
    if isinstance(prompt, str):
        special = request.add_special_tokens is not False
        token_ids = await tokenize(model.tokenizer, prompt, add_special_tokens=special)
    else:
        token_ids = list(prompt)
        check_token_ids(model.tokenizer, token_ids, "prompt")
    if not token_ids:
        raise RequestError("the prompt must hold at least one token", param="prompt", code="empty_prompt")
    max_tokens = output_budget(
        model, len(token_ids), request.max_tokens, DEFAULT_MAX_TOKENS, param="max_tokens", prompt="prompt"
    )
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling_params=request.sampling_params(max_tokens=max_tokens, logprobs=request.logprobs),
        cache_salt=request.cache_salt or "",
        adapter=model.adapter,
    )


class CompletionFormat:
    """Writes one completion, whole or as events."""

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        self._request = request
        self._generation = generation
        self._num_top = request.logprobs or 0
        self._fields: dict[str, Any] = {
            "id": generation.requests[0].request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": generation.name,
        }
        self._envelope = Envelope(
            self._fields, generation, include_usage=request.include_usage, continuous=request.continuous_usage
        )

    def start(self) -> bytes:
        """The echoed prompts and their token ids, if asked for: one event a choice."""
        if not (self._request.echo or self._request.return_token_ids):
            return b""
        events = b""
        for index in range(self._generation.num_choices):
            ids = b""
            if self._request.return_token_ids:
                ids = b',"prompt_token_ids":' + to_json(self._prompt_token_ids(index)) + b',"token_ids":[]'
            text = b',"text":' + to_json(self._echoed(index)) + b',"logprobs":null,"finish_reason":null'
            events += self._envelope.event(b'"index":%d' % index + text + ids)
        return events

    def write(self, delta: ChoiceDelta) -> bytes:
        """One event: text, and the finish reason if this is the choice's last."""
        logprobs = b"null" if not delta.logprobs else to_json(self._logprobs(delta))
        choice = b'"index":%d,"text":' % delta.index + to_json(delta.text) + b',"logprobs":' + logprobs
        if delta.finish_reason is None:
            choice += b',"finish_reason":null'
        else:
            choice += b',"finish_reason":' + to_json(delta.finish_reason)
            choice += b',"stop_reason":' + to_json(delta.stop_reason)
        if self._request.return_token_ids:
            choice += b',"token_ids":' + to_json(delta.token_ids)
        return self._envelope.event(choice)

    def usage(self) -> bytes:
        """The last event before the end mark, if asked for."""
        return self._envelope.usage()

    def whole(self, choices: list[ChoiceDelta]) -> dict[str, Any]:
        """The response object of a request without streaming."""
        return {
            **self._fields,
            "choices": [self._choice(choice) for choice in choices],
            "usage": self._generation.usage.as_dict(),
            **self._generation.receipt_fields(),
        }

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        ids = {}
        if self._request.return_token_ids:
            ids = {"prompt_token_ids": self._prompt_token_ids(choice.index), "token_ids": choice.token_ids}
        return {
            "index": choice.index,
            "text": self._echoed(choice.index) + choice.text,
            "logprobs": self._logprobs(choice) if self._request.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **ids,
        }

    def _prompt_of(self, choice: int) -> int:
        return choice // self._request.num_choices

    def _prompt_token_ids(self, choice: int) -> list[int]:
        return list(self._generation.requests[self._prompt_of(choice)].prompt_token_ids)

    def _echoed(self, choice: int) -> str:
        if not self._request.echo:
            return ""
        prompt = self._request.prompts[self._prompt_of(choice)]
        return prompt if isinstance(prompt, str) else self._generation.model.tokenizer.decode(list(prompt))

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any]:
        return completion_logprobs(delta.logprobs, self._generation.model.tokenizer, self._num_top)
