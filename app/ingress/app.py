"""The ASGI application: everything of the ingress that needs neither Ray nor a real socket."""

from __future__ import annotations

import re
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.ingress.auth import ApiKeys
from app.ingress.errors import UnforeseenErrors, handle_error
from app.ingress.models import ModelRegistry
from app.ingress.routes import Routes
from app.ingress.settings import HttpSettings
from app.ingress.sse import SERVER_SEND
from app.ingress.trace_middleware import TraceMiddleware
from app.telemetry.application import ApplicationMetrics
from app.telemetry.tracing import Tracing
from app.usage import UsageLedger
from engine.errors import QuireError

REQUEST_ID_HEADER = "x-request-id"
_SOUND_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


def build_asgi_app(
    registry: ModelRegistry,
    settings: HttpSettings | None = None,
    api_keys: ApiKeys | None = None,
    metrics: ApplicationMetrics | None = None,
    tracing: Tracing | None = None,
    ledger: UsageLedger | None = None,
) -> Starlette:
    """The OpenAI-compatible application over the models of `registry`; alone in its application without `metrics`,
    not traced without `tracing`, and without a `ledger` it keeps no usage."""
    settings = settings or HttpSettings()
    metrics = metrics or ApplicationMetrics(uuid.uuid4().hex, lambda: registry)
    middleware = [Middleware(UnforeseenErrors)]
    if settings.echo_request_id:
        middleware.insert(0, Middleware(RequestIdMiddleware))
    if tracing is not None:
        middleware.insert(0, Middleware(TraceMiddleware, tracing))
    # Starlette types handlers by the widest exception.
    handlers = {QuireError: handle_error, HTTPException: handle_error}
    app = _Application(
        routes=Routes(registry, api_keys or ApiKeys(), settings, metrics, ledger).routes(),
        middleware=middleware,
        exception_handlers=handlers,
    )
    # A wrong path is 404 at once, not a redirect to what it resembles.
    app.router.redirect_slashes = False
    return app


class _Application(Starlette):
    """Keeps at hand the `send` that it is called with, for a stream's events: all layers look at how an answer starts,
    and at nothing that follows."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[SERVER_SEND] = send
        await super().__call__(scope, receive, send)


class RequestIdMiddleware:
    """Answers with the id that the client gave its request, so that both sides' logs can be matched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _SOUND_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)
