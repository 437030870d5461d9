"""What the HTTP layer can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpSettings:
    """What the HTTP layer can be told.

    Attributes:
        max_body_bytes: longest request body that is read.
        echo_request_id: answer with the request's x-request-id, or one made up. Off behind Serve, which does it too.
        access_log: write a line for each request for tokens when it has ended.
        keep_alive_s: a stream gets a comment line after this long without news.
    """

    max_body_bytes: int = 8 << 20
    echo_request_id: bool = True
    keep_alive_s: float = 5.0
    access_log: bool = False
