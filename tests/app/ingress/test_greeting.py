"""The line to paste is one that a shell and curl understand."""

from __future__ import annotations

import json
import shlex

from app.ingress.greeting import curl_line, dialable, greeting


def test_the_curl_line_survives_a_shell() -> None:
    words = shlex.split(curl_line("http://0.0.0.0:8000", "it's"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert words[2:4] == ["-H", "content-type: application/json"]
    assert json.loads(words[5])["model"] == "it's"


def test_addresses_that_nobody_can_dial_become_loopback() -> None:
    assert dialable("http://0.0.0.0:8000/") == "http://127.0.0.1:8000"
    assert dialable("http://[::]:8000") == "http://[::1]:8000"
    assert dialable("http://10.0.0.7:80/llm") == "http://10.0.0.7:80/llm"


def test_the_greeting_names_all_models() -> None:
    text = greeting("http://127.0.0.1:8000", ["a", "b"])
    assert "http://127.0.0.1:8000/v1 with a, b" in text
    assert curl_line("http://127.0.0.1:8000", "a") in text
