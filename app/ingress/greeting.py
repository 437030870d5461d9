"""What a newcomer reads when the models are ready: a URL and a line to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

# Unspecified addresses listen everywhere, but nobody can dial them.
_UNDIALABLE = {"//0.0.0.0": "//127.0.0.1", "//[::]": "//[::1]"}


def dialable(url: str) -> str:
    """The URL with an address that works from this machine."""
    for unspecified, loopback in _UNDIALABLE.items():
        url = url.replace(unspecified, loopback)
    return url.rstrip("/")


def curl_line(url: str, model_id: str) -> str:
    """A command that asks one question, in one line and quoted for a shell."""
    body = {"model": model_id, "messages": [{"role": "user", "content": "Name the capital of France."}]}
    address = f"{dialable(url)}/v1/chat/completions"
    return f"curl {address} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"


def greeting(url: str, model_ids: Sequence[str]) -> str:
    """Quire's URL, its models, and a curl line for the first."""
    return f"Quire is ready at {dialable(url)}/v1 with {', '.join(model_ids)}. Try:\n  {curl_line(url, model_ids[0])}"
