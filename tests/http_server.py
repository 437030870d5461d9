"""An HTTP server on a free port of this machine, for tests whose other side speaks HTTP."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may go as they like
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """A handler that keeps connections open and writes nothing to the console."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is http.server's
        pass


@contextmanager
def serving_http(handler: type[Handler]) -> Iterator[str]:
    """A server, each of whose requests is answered on a thread of its own; its URL."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
