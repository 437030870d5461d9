"""The HTTP endpoints: read, validate, generate, answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.ingress.auth import ApiKeys
from app.ingress.chat import ChatFormat, chat_generation
from app.ingress.completions import CompletionFormat, completion_generation
from app.ingress.errors import BodyTooLargeError, parse_body
from app.ingress.generation import ChoiceDelta, Generation
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.prompts import check_token_ids, render_chat, tokenize
from app.ingress.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeMessages,
    TokenizePrompt,
)
from app.ingress.sse import EventStreamResponse, EventWriter, unless_disconnected, write_events
from app.version import version


class ResponseFormat(EventWriter, Protocol):
    """Writes a finished generation whole, too."""

    def whole(self, choices: list[ChoiceDelta]) -> dict[str, Any]:
        """The response object of a request without streaming."""
        ...


class Routes:
    """The endpoints over one registry of models."""

    def __init__(self, registry: ModelRegistry, api_keys: ApiKeys, max_body_bytes: int) -> None:
        self._registry = registry
        self._api_keys = api_keys
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[Route]:
        """Starlette's table of paths."""
        return [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.show_model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/version", self.show_version, methods=["GET"]),
        ]

    async def chat_completions(self, request: Request) -> Response:
        body = parse_body(ChatCompletionRequest, await self._authorised_body(request))
        generation = await chat_generation(self._registry, body)
        return await _respond(request, generation, ChatFormat(body, generation), stream=bool(body.stream))

    async def completions(self, request: Request) -> Response:
        body = parse_body(CompletionRequest, await self._authorised_body(request))
        generation = await completion_generation(self._registry, body)
        return await _respond(request, generation, CompletionFormat(body, generation), stream=bool(body.stream))

    async def list_models(self, request: Request) -> Response:
        self._api_keys.check(request)
        data = [_model_object(name, model) for name, model in self._registry.names()]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        self._api_keys.check(request)
        name = request.path_params["model"]
        return JSONResponse(_model_object(name, self._registry.get(name)))

    async def tokenize(self, request: Request) -> Response:
        raw = await self._authorised_body(request)
        body: TokenizePrompt | TokenizeMessages
        if _has_key(raw, "messages"):
            body = parse_body(TokenizeMessages, raw)
            model = self._registry.get_only(body.model)
            text = render_chat(model, body)
        else:
            body = parse_body(TokenizePrompt, raw)
            model = self._registry.get_only(body.model)
            text = body.prompt
        token_ids = await tokenize(model.tokenizer, text, add_special_tokens=body.add_special_tokens)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": model.max_model_len,
            "tokens": token_ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            answer["token_strs"] = [model.tokenizer.token_text(token_id) for token_id in token_ids]
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        body = parse_body(DetokenizeRequest, await self._authorised_body(request))
        model = self._registry.get_only(body.model)
        check_token_ids(model.tokenizer, body.tokens, "tokens")
        return JSONResponse({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - Starlette passes the request
        states = [model.client.state() for model in self._registry]
        ready = all(state.ready for state in states)
        models = [state._asdict() for state in states]
        return JSONResponse(
            {"status": "ok" if ready else "unavailable", "models": models}, status_code=200 if ready else 503
        )

    async def show_version(self, request: Request) -> Response:  # noqa: ARG002 - Starlette passes the request
        return JSONResponse({"version": version()})

    async def _authorised_body(self, request: Request) -> bytes:
        """The body, read only for who may use the endpoint and up to the bound."""
        self._api_keys.check(request)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the request body exceeds {self._max_body_bytes} bytes", code="request_too_large")


async def _respond(request: Request, generation: Generation, writer: ResponseFormat, *, stream: bool) -> Response:
    deltas = generation.deltas()
    if not stream:
        choices = await unless_disconnected(request.receive, _collect(generation, deltas))
        return JSONResponse(writer.whole(choices))
    # A request that a replica refuses fails here, while it can still be answered with its own status.
    first = await unless_disconnected(request.receive, anext(deltas))
    return EventStreamResponse(write_events(first, deltas, writer))


async def _collect(generation: Generation, deltas: AsyncGenerator[list[ChoiceDelta], None]) -> list[ChoiceDelta]:
    """All deltas joined, one a choice."""
    choices = [ChoiceDelta(index) for index in range(generation.num_choices)]
    async with aclosing(deltas):
        async for batch in deltas:
            for delta in batch:
                choice = choices[delta.index]
                choice.text += delta.text
                choice.token_ids += delta.token_ids
                choice.logprobs += delta.logprobs
                choice.finish_reason = delta.finish_reason
                choice.stop_reason = delta.stop_reason
    return choices


def _model_object(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "quire",
        "root": model.id,
        "max_model_len": model.max_model_len,
    }


def _has_key(raw: bytes, key: str) -> bool:
    """Whether a JSON object has a key; what is no JSON is for the validation to say."""
    try:
        value = from_json(raw)
    except ValueError:
        return False
    return isinstance(value, dict) and key in value
