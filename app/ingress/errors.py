"""Errors as OpenAI's clients expect them: one JSON shape, and the status code from the error's own class."""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import OverloadedError, QuireError, RequestError

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)

# Errors quote what the client sent, which may be megabytes.
_MAX_TEXT = 2000

_TYPES = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class AuthenticationError(RequestError):
    """No API key, or one that is not known."""

    http_status = 401


class BodyTooLargeError(RequestError):
    """The request's body exceeds what the ingress reads."""

    http_status = 413


class ClientDisconnectedError(Exception):
    """The client has gone; nobody reads an answer."""


def error_body(error: Exception) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`, and `retry_after` in seconds if it is to come again: a stream has its
    status and headers behind it when it learns that. An unforeseen error tells the client nothing of its inside."""
    status = status_of(error)
    message = str(error) if isinstance(error, QuireError | HTTPException) else "internal error; see the server's log"
    if isinstance(error, HTTPException):
        message = error.detail
    return {
        "error": {
            "message": _shortened(message),
            "type": _TYPES.get(status, "server_error"),
            "param": _shortened(getattr(error, "param", None)),
            "code": getattr(error, "code", None),
            **({"retry_after": _retry_after(error)} if isinstance(error, OverloadedError) else {}),
        }
    }


def _shortened(text: str | None) -> str | None:
    return text if text is None or len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."


def status_of(error: Exception) -> int:
    """The HTTP status an error is answered with."""
    if isinstance(error, QuireError):
        return error.http_status
    return error.status_code if isinstance(error, HTTPException) else HTTPStatus.INTERNAL_SERVER_ERROR


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed before its response began."""
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(_retry_after(error))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=status_of(error), headers=headers)


def _retry_after(error: OverloadedError) -> int:
    return max(1, math.ceil(error.retry_after_s))


def error_event(error: Exception) -> bytes:
    """The server-sent event that ends a stream which failed after it began."""
    return b"data: " + json.dumps(error_body(error), ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for QuireError and HTTPException."""
    if isinstance(error, HTTPException):
        what = {404: "no such path", 405: f"method {request.method} is not allowed"}.get(error.status_code)
        error.detail = f"{what}: {request.url.path}" if what else error.detail
    elif status_of(error) >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s %s failed: %s", request.method, request.url.path, error)
    return error_response(error)


class UnforeseenErrors:
    """The outermost layer: a fault of ours is logged with its trace and answered like any other error.

    Starlette's own layer would raise the error again, which Serve counts as a failure of the replica's code path and
    prints a second time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except ClientDisconnectedError:
            pass
        except Exception as error:
            logger.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if started or scope["type"] != "http":
                raise
            await error_response(error)(scope, receive, send)


def parse_body(model: type[Body], body: bytes) -> Body:
    """Validate a JSON body; RequestError names the first parameter at fault."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: ValidationError) -> RequestError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    # A parameter nobody knows is likely a misspelling, and the cause of whatever else is wrong.
    first = next((detail for detail in details if detail["type"] == "extra_forbidden"), details[0])
    kind, param, message = first["type"], _path(first["loc"]), first["msg"]
    if kind in ("json_invalid", "model_type") and not param:
        return RequestError(f"the body must be a JSON object: {message}", code="invalid_json")
    if kind == "extra_forbidden":
        return RequestError(f"unrecognized parameter: {param}", param=param, code="unknown_parameter")
    if kind == "missing":
        return RequestError(f"missing required parameter: {param}", param=param, code="missing_required_parameter")
    if kind == "not_supported":
        return RequestError(message, param=param, code="unsupported_parameter")
    return RequestError(f"invalid {param}: {message}", param=param, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`, as OpenAI spells it."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
