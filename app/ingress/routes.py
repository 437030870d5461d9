"""The HTTP endpoints: read, validate, generate, answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from http import HTTPStatus
from typing import Any, Protocol

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.ingress.access_log import log_request
from app.ingress.auth import ApiKeys
from app.ingress.chat import ChatFormat, chat_generation
from app.ingress.completions import CompletionFormat, completion_generation
from app.ingress.errors import BodyTooLargeError, ClientDisconnectedError, parse_body, status_of
from app.ingress.generation import ChoiceDelta, Generation
from app.ingress.models import ListedName, ModelRegistry
from app.ingress.pacing import Pacer
from app.ingress.prompts import check_token_ids, render_chat, tokenize
from app.ingress.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeMessages,
    TokenizePrompt,
)
from app.ingress.receipt import HEADER as RECEIPT_HEADER
from app.ingress.receipt import wants_receipt
from app.ingress.request_terms import request_terms
from app.ingress.settings import HttpSettings
from app.ingress.sse import EventStreamResponse, EventWriter, unless_disconnected, write_events
from app.ingress.usage import keep_usage
from app.telemetry import spans
from app.telemetry.application import ApplicationMetrics
from app.telemetry.ingress_metrics import RequestRecord
from app.telemetry.request_trace import Phase, current_trace
from app.usage import UsageLedger
from app.version import version


class ResponseFormat(EventWriter, Protocol):
    """Writes a finished generation whole, too."""

    def whole(self, choices: list[ChoiceDelta]) -> dict[str, Any]:
        """The response object of a request without streaming."""
        ...


class Routes:
    """The endpoints over one registry of models."""

    def __init__(
        self,
        registry: ModelRegistry,
        api_keys: ApiKeys,
        settings: HttpSettings,
        metrics: ApplicationMetrics,
        ledger: UsageLedger | None = None,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._api_keys = api_keys
        self._max_body_bytes = settings.max_body_bytes
        self._keep_alive_s = settings.keep_alive_s
        self._access_log = settings.access_log
        self._ledger = ledger
        self._pacer: Pacer | None = None
        self._was_ready = False

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
            Route("/metrics", self.show_metrics, methods=["GET"]),
            Route("/version", self.show_version, methods=["GET"]),
        ]

    async def chat_completions(self, request: Request) -> Response:
        with self._recorded("chat") as record:
            with Phase(spans.RECEIVE):
                tenant, raw = await self._authorised(request)
                body = parse_body(ChatCompletionRequest, raw)
            if (trace := current_trace()) is not None and trace.captures_content:
                trace.asks([message.for_template() for message in body.messages])
            with Phase(spans.TOKENIZE):
                generation = await chat_generation(self._registry, body)
            _set_terms(generation, request, tenant, raw)
            writer = ChatFormat(body, generation)
            return await self._respond(request, generation, writer, record, stream=bool(body.stream))

    async def completions(self, request: Request) -> Response:
        with self._recorded("completions") as record:
            with Phase(spans.RECEIVE):
                tenant, raw = await self._authorised(request)
                body = parse_body(CompletionRequest, raw)
            if (trace := current_trace()) is not None and trace.captures_content:
                trace.asks([{"role": "user", "content": str(prompt)} for prompt in body.prompts])
            with Phase(spans.TOKENIZE):
                generation = await completion_generation(self._registry, body)
            _set_terms(generation, request, tenant, raw)
            writer = CompletionFormat(body, generation)
            return await self._respond(request, generation, writer, record, stream=bool(body.stream))

    async def list_models(self, request: Request) -> Response:
        self._api_keys.check(request)
        data = [_model_object(listed) for listed in self._registry.names()]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        self._api_keys.check(request)
        name = request.path_params["model"]
        return JSONResponse(_model_object(self._registry.named(name)))

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
        all_ready = bool(states) and all(state.ready for state in states)
        self._was_ready |= all_ready
        # Once it has begun to serve, a model that is added, or fails, does not take the others away from their clients.
        serves = all_ready or (self._was_ready and any(state.ready for state in states))
        status = "ok" if all_ready else "degraded" if serves else "unavailable"
        models = [state._asdict() for state in states]
        return JSONResponse({"status": status, "models": models}, status_code=200 if serves else 503)

    async def show_metrics(self, request: Request) -> Response:
        self._api_keys.check(request)
        exposed = await self._metrics.exposed(request.headers.get("accept", ""))
        return Response(exposed.content, headers={"content-type": exposed.content_type})

    async def show_version(self, request: Request) -> Response:  # noqa: ARG002 - Starlette passes the request
        return JSONResponse({"version": version()})

    @contextmanager
    def _recorded(self, endpoint: str) -> Iterator[RequestRecord]:
        """Count a request that ends here without an answer; what is answered ends its record itself."""
        record = self._metrics.own.arrived(endpoint)
        if self._access_log:
            record.when_ended(log_request)
        if (trace := current_trace()) is not None:
            trace.record = record
            record.exemplar = {"trace_id": trace.trace_id, "span_id": trace.span_id}
        try:
            yield record
        except ClientDisconnectedError:
            record.end()
            raise
        except Exception as error:
            record.code = status_of(error)
            record.end()
            raise
        except BaseException:
            # Serve has cancelled it: the client went away.
            record.end()
            raise

    async def _authorised_body(self, request: Request) -> bytes:
        return (await self._authorised(request))[1]

    async def _authorised(self, request: Request) -> tuple[str, bytes]:
        """Whose request it is, and its body, read only for who may use the endpoint and up to the bound."""
        tenant = self._api_keys.check(request)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise self._too_large()
        return tenant, bytes(body)

    async def _respond(
        self, request: Request, generation: Generation, writer: ResponseFormat, record: RequestRecord, *, stream: bool
    ) -> Response:
        if wants_receipt(request.headers.get(RECEIPT_HEADER)):
            generation.keep_receipts()
        generation.record_in(record)
        if self._ledger is not None:
            keep_usage(self._ledger, generation, record)
        if (trace := current_trace()) is not None:
            generation.trace_in(trace, stream=stream)
        deltas = generation.deltas()
        if not stream:
            choices = await unless_disconnected(request.receive, _collect(generation, deltas))
            answer = JSONResponse(writer.whole(choices))
            record.code = HTTPStatus.OK
            record.end()
            return answer
        first = asyncio.ensure_future(anext(deltas))
        try:
            # A request that a replica refuses fails here, while it can still be answered with its own status. One that
            # waits longer gets its status now, and comments until its turn comes.
            await unless_disconnected(request.receive, asyncio.wait((first,), timeout=self._keep_alive_s))
            if first.done():
                first.result()
        except BaseException:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            raise
        # Made here, on the loop whose load it measures.
        self._pacer = self._pacer or Pacer()
        events = write_events(first, deltas, writer, record)
        return EventStreamResponse(events, self._keep_alive_s, self._pacer, record)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the request body exceeds {self._max_body_bytes} bytes", code="request_too_large")


def _set_terms(generation: Generation, request: Request, tenant: str, raw: bytes) -> None:
    told_by = request.url.path.encode() + b"\0" + raw
    generation.terms = request_terms(request.headers, generation.model.client.admission, tenant, told_by)


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


def _model_object(listed: ListedName) -> dict[str, Any]:
    parents = {model.parent for model in listed.models}
    return {
        "id": listed.name,
        "object": "model",
        "created": max(model.created for model in listed.models),
        "owned_by": "quire",
        # A split's requests go to several models, so that its root is itself and its limit is what all can take.
        "root": listed.models[0].id if len(listed.models) == 1 else listed.name,
        # Of an adapter, the model that it adapts.
        "parent": parents.pop() if len(parents) == 1 else None,
        "max_model_len": min(model.max_model_len for model in listed.models),
    }


def _has_key(raw: bytes, key: str) -> bool:
    """Whether a JSON object has a key; what is no JSON is for the validation to say."""
    try:
        value = from_json(raw)
    except ValueError:
        return False
    return isinstance(value, dict) and key in value
