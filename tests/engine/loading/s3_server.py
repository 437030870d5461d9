"""moto's S3 behind a proxy that counts what is downloaded and breaks connections when told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any, NamedTuple, Self

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.http_server import Handler, serving_http

_PIECE = 1 << 14


class Download(NamedTuple):
    """One GET of an object: its path, the first byte it asked for, and how many it got."""

    path: str
    start: int
    num_bytes: int


class Proxy:
    """Forwards to a server.

    Attributes:
        downloads: of objects, in the order in which they ended.
        listings: how often a bucket was listed.
        allow: asked before each piece of a body with the bytes of all downloads so far; False breaks the connection.
        sent: bytes of objects.
        status: answer with this instead of asking the server.
        url: while it is serving.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.downloads: list[Download] = []
        self.allow: Callable[[int], bool] = lambda _: True
        self.status: Callable[[], int | None] = lambda: None
        self.sent = 0
        self.listings = 0
        self.url = ""
        self._lock = threading.Lock()
        self._upstream = upstream

    @contextmanager
    def serving(self) -> Iterator[Self]:
        """Answers until the body ends."""
        proxy = self

        class Forward(Handler):
            def do_GET(self) -> None:  # noqa: N802  # the name is http.server's
                proxy._forward(self)

            do_HEAD = do_GET  # noqa: N815  # the name is http.server's

        with serving_http(Forward) as self.url:
            yield self

    def clear(self) -> None:
        """Forget what was counted."""
        self.downloads, self.sent, self.listings = [], 0, 0

    def _forward(self, handler: Handler) -> None:
        if (status := self.status()) is not None:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        with self._lock:
            self.listings += "list-type=2" in handler.path
        connection = HTTPConnection(*self._upstream)
        connection.request(handler.command, handler.path, headers=dict(handler.headers))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "server", "date", "transfer-encoding", "content-length"):
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(body))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if handler.command == "HEAD":
            return
        is_object = answer.status == 206
        came = 0
        try:
            for start in range(0, len(body), _PIECE):
                if is_object and not self.allow(self.sent):
                    handler.close_connection = True
                    return
                piece = body[start : start + _PIECE]
                handler.wfile.write(piece)
                came += len(piece)
                with self._lock:
                    self.sent += len(piece) if is_object else 0
        except OSError:  # the client was killed
            handler.close_connection = True
        finally:
            if is_object:
                first = int(handler.headers["Range"].removeprefix("bytes=").partition("-")[0])
                with self._lock:
                    self.downloads.append(Download(handler.path.partition("?")[0], first, came))


class S3Server(NamedTuple):
    """Attributes: `client` puts objects, past the proxy, at `url`; `proxy` is where the code under test reads."""

    client: Any
    proxy: Proxy
    url: str


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """A server on free ports, with the bucket "models"."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **credentials())
        client.create_bucket(Bucket="models")
        with Proxy((host, port)).serving() as proxy:
            yield S3Server(client, proxy, url)
    finally:
        server.stop()


def credentials() -> dict[str, str]:
    return {"aws_access_key_id": "test", "aws_secret_access_key": "test"}


def use_s3(patch: pytest.MonkeyPatch, url: str) -> None:
    """What a user sets."""
    for name, value in credentials().items():
        patch.setenv(name.upper(), value)
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", url)
