"""moto's S3 behind a proxy that counts what is downloaded and breaks connections when told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import boto3
import pytest
from moto.server import ThreadedMotoServer

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
        status: answer with this instead of asking the server.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.downloads: list[Download] = []
        self.allow: Callable[[int], bool] = lambda _: True
        self.status: Callable[[], int | None] = lambda: None
        self.sent = 0
        self.listings = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._forward(self, upstream)

            do_HEAD = do_GET  # noqa: N815  # the name is http.server's

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is http.server's
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def clear(self) -> None:
        """Forget what was counted."""
        self.downloads, self.sent, self.listings = [], 0, 0

    def _forward(self, handler: BaseHTTPRequestHandler, upstream: tuple[str, int]) -> None:
        if (status := self.status()) is not None:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        with self._lock:
            self.listings += "list-type=2" in handler.path
        connection = HTTPConnection(*upstream)
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
    """Attributes: `client` puts objects, past the proxy; `proxy` is where the code under test reads."""

    client: Any
    proxy: Proxy
    url: str


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """A server on free ports, with the bucket "models"."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy((host, port))
    try:
        url = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **credentials())
        client.create_bucket(Bucket="models")
        yield S3Server(client, proxy, url)
    finally:
        proxy.close()
        server.stop()


def credentials() -> dict[str, str]:
    return {"aws_access_key_id": "test", "aws_secret_access_key": "test"}


def use_s3(patch: pytest.MonkeyPatch, url: str) -> None:
    """What a user sets."""
    for name, value in credentials().items():
        patch.setenv(name.upper(), value)
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", url)
