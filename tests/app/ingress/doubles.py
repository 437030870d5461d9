"""Model clients for tests: one that says what the test wrote, and one over a real engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.applications import Starlette

from app.balancer import RequestTerms, RouteReceipt
from app.balancer.admission_settings import AdmissionSettings
from app.ingress.client import ModelState
from app.ingress.receipt import Receipt
from app.replica.counters import replica_counters
from app.telemetry.model_samples import ModelTelemetry, RouteCounts
from engine.async_engine import AsyncLLMEngine
from engine.errors import QuireError
from engine.outputs import SequenceOutput, TokenLogprobs
from engine.request import EngineRequest
from engine.tokenization import Tokenizer

BASE_URL = "http://quire.test"


class ScriptedClient:
    """Speaks a given text, a token a step, with the token's position as its log-probability.

    Keeps the engine's promises: `max_tokens`, the end-of-sequence token, one last output a request.

    Attributes:
        requests: all that came, and their `terms`.
        num_yielded: outputs that were read.
        closed: generators that the reader closed before their end.
        stopped: sequences that the reader had enough of.
    """

    def __init__(self, tokenizer: Tokenizer, *texts: str, num_cached_tokens: int = 0, step_s: float = 0.0) -> None:
        assert tokenizer.eos_token_id is not None
        self._tokenizer = tokenizer
        self._scripts = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
        self._num_cached_tokens = num_cached_tokens
        self._step_s = step_s
        self.refusal: QuireError | None = None
        self.failure: tuple[int, Exception] | None = None
        self.ready = True
        self.max_model_len: int | None = 512
        self.requests: list[EngineRequest] = []
        self.terms: list[RequestTerms] = []
        self.num_yielded = 0
        self.closed = 0
        self.stopped: list[tuple[str, int]] = []
        self.settings = AdmissionSettings()
        self.told = ModelTelemetry(RouteCounts(), 0, 0, 1, {})

    async def generate(
        self, request: EngineRequest, receipt: Receipt | None = None, terms: RequestTerms | None = None
    ) -> AsyncGenerator[list[SequenceOutput], None]:
        self.requests.append(request)
        self.terms.append(terms or RequestTerms())
        if self.refusal is not None:
            raise self.refusal
        if receipt is not None:
            receipt.placed(RouteReceipt("replica-1", 16, 0.25, 0.5, 0.0625), 1)
            receipt.cached_tokens, receipt.wait_s = self._num_cached_tokens, 0.125
            receipt.request_class, receipt.queued_s = self.terms[-1].class_name, 0.0625
        ended = False
        try:
            for step, outputs in enumerate(self._steps(request)):
                if self.failure is not None and step == self.failure[0]:
                    raise self.failure[1]
                await asyncio.sleep(self._step_s)
                ended = outputs[-1].request_finished
                self.num_yielded += 1
                yield outputs
        finally:
            self.closed += not ended

    @property
    def admission(self) -> AdmissionSettings:
        return self.settings

    def stop(self, request_id: str, index: int) -> None:
        self.stopped.append((request_id, index))

    async def wait_ready(self, timeout_s: float) -> bool:
        await asyncio.sleep(0 if self.ready else timeout_s)
        return self.ready

    def state(self) -> ModelState:
        detail = "ready" if self.ready else "starting"
        return ModelState("scripted", self.ready, int(self.ready), detail, self.max_model_len)

    def telemetry(self) -> ModelTelemetry:
        return self.told

    def _steps(self, request: EngineRequest) -> list[list[SequenceOutput]]:
        params = request.sampling_params
        bound = params.max_tokens or 1 << 30
        scripts = [self._scripts[index % len(self._scripts)][:bound] for index in range(params.n)]
        length = max(map(len, scripts))
        steps = []
        for position in range(length):
            live = [index for index, script in enumerate(scripts) if position < len(script)]
            steps.append([self._output(request, index, scripts[index], position) for index in live])
        steps[-1][-1].request_finished = True
        return steps

    def _output(self, request: EngineRequest, index: int, script: Sequence[int], position: int) -> SequenceOutput:
        token_id = script[position]
        output = SequenceOutput(request.request_id, index, [token_id], num_cached_tokens=self._num_cached_tokens)
        num_top = request.sampling_params.logprobs
        if num_top is not None:
            top = tuple((rank + 1, -float(rank)) for rank in range(num_top))
            output.logprobs = [TokenLogprobs(-float(position), top)]
        if position == len(script) - 1:
            is_end = token_id == self._tokenizer.eos_token_id
            output.finish_reason = "stop" if is_end else "length"
            output.stop_token_id = token_id if is_end else None
        return output


class EngineClient:
    """A ModelClient over a real engine in this process: what a replica and its sockets do, without them."""

    def __init__(self, model_id: str, engine: AsyncLLMEngine) -> None:
        self._model_id = model_id
        self._engine = engine
        self._queues: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[SequenceOutput]]] = {}
        engine.start(self._on_step)

    async def generate(
        self,
        request: EngineRequest,
        receipt: Receipt | None = None,  # noqa: ARG002 - there is one engine
        terms: RequestTerms | None = None,  # noqa: ARG002 - nothing waits
    ) -> AsyncGenerator[list[SequenceOutput], None]:
        queue: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        self._queues[request.request_id] = (asyncio.get_running_loop(), queue)
        try:
            self._engine.add_request(request)
            finished = False
            while not finished:
                outputs = [await queue.get()]
                while not queue.empty():
                    outputs.append(queue.get_nowait())
                finished = any(output.request_finished for output in outputs)
                yield outputs
        finally:
            del self._queues[request.request_id]
            self._engine.abort(request.request_id)

    @property
    def admission(self) -> AdmissionSettings:
        return AdmissionSettings()

    def stop(self, request_id: str, index: int) -> None:
        self._engine.abort(request_id, index)

    async def wait_ready(self, timeout_s: float) -> bool:  # noqa: ARG002 - it is
        return True

    def state(self) -> ModelState:
        return ModelState(self._model_id, True, 1, "ready", self._engine.max_model_len)

    def telemetry(self) -> ModelTelemetry:
        return ModelTelemetry(RouteCounts(), 0, 0, 1, {"replica": replica_counters(self._engine.accounts())})

    def _on_step(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.request_id in self._queues:
                loop, queue = self._queues[output.request_id]
                loop.call_soon_threadsafe(queue.put_nowait, output)


@asynccontextmanager
async def http_client(app: Starlette, **headers: str) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of the application, without a socket."""
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url=BASE_URL, headers=headers) as client:
        yield client


def events(body: str) -> list[str]:
    """The data of each server-sent event."""
    blocks = body.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def chat(text: str = "hello", **parameters: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **parameters}
