"""AsyncLLMEngine: an LLMEngine on a thread of its own, for callers on any thread or event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from engine.config import CacheConfig, EngineConfig
from engine.control import WorkerLauncher
from engine.decoding.output_builder import RequestOutputBuilder
from engine.engine import LLMEngine
from engine.errors import ConfigError, EngineDeadError, RequestError
from engine.memory import BlockChanges
from engine.model_config import ModelConfig
from engine.outputs import EngineAccounts, EngineStats, FinishReason, RequestOutput, SequenceOutput
from engine.progress import Progress
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

OnStep = Callable[[list[SequenceOutput]], None]
OnBlocks = Callable[[BlockChanges], None]

# Work without a completed step for this long means that the engine hangs: a whole prompt of a large model fits in.
HANG_S = 300.0
# The KV pool is accounted for this often while steps follow one another: it takes time that grows with what runs.
ACCOUNTS_INTERVAL_S = 1.0


class AsyncLLMEngine:
    """Adds, aborts and streams from any thread; steps on its own.

    Commands wait in a queue that the engine thread empties between two steps, so an abort frees its blocks within one
    step. Each step's outputs leave through `on_step` in one call, on the engine thread.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._on_step: OnStep | None = None
        self._on_blocks: OnBlocks | None = None
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[SequenceOutput]]] = {}
        self._commands: deque[EngineRequest | _Abort] = deque()
        self._live: set[str] = set()
        self._wake = threading.Condition(threading.RLock())
        self._stopping = False
        self._error: BaseException | None = None
        self._stats = engine.stats()
        self._accounts = EngineAccounts(self._stats, engine.memory_usage())
        self._accounts_due_s = 0.0
        # Since when a step has been due: since the last one, or since work came. None while there is no work.
        self._step_due_since: float | None = None
        self._thread: threading.Thread | None = None
        self._request_ids = itertools.count()

    @classmethod
    def from_options(
        cls,
        model: str,
        config: EngineConfig | None = None,
        progress: Progress | None = None,
        launcher: WorkerLauncher | None = None,
    ) -> AsyncLLMEngine:
        """As LLMEngine.from_options. Call `start()` next."""
        return cls(LLMEngine.from_options(model, config, progress, launcher))

    @property
    def model_config(self) -> ModelConfig:
        return self._engine.model_config

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def cache_config(self) -> CacheConfig:
        return self._engine.cache_config

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def model_id(self) -> str:
        return self._engine.model_id

    def warm_up(self) -> None:
        """Run one real request to its end, so that first-use costs are paid before the first user comes."""
        assert self._thread is None, "warm_up() comes before start()"
        prompt = [0] * min(32, self.max_model_len - 2) or [0]
        params = SamplingParams(max_tokens=min(2, self.max_model_len - len(prompt)), ignore_eos=True, temperature=0.0)
        self._engine.add_request(EngineRequest("warm-up", prompt, params))
        while self._engine.has_unfinished_requests:
            self._engine.step()
        self._engine.reset_prefix_cache()
        self._stats = self._engine.stats()
        self._accounts = EngineAccounts(self._stats, self._engine.memory_usage())

    def start(self, on_step: OnStep | None = None, on_blocks: OnBlocks | None = None) -> None:
        """Start the engine thread. Both callbacks are called on it and must return at once.

        Args:
            on_step: gets every step's outputs, an empty list for a step that drew nothing.
            on_blocks: gets what the prefix cache gained and lost, before the outputs of the step that did it.
        """
        assert self._thread is None, "start() is called once"
        self._on_step = on_step
        self._on_blocks = on_blocks
        if on_blocks is not None:
            self._engine.watch_blocks()
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Abort what is left and end the thread. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        self._engine.close()

    def add_request(self, request: EngineRequest) -> None:
        """Check a request and queue it for the next step.

        Raises:
            RequestError: it could never be served, or its id is in use.
            EngineDeadError: the engine has failed or was shut down.
        """
        self._engine.validate(request)
        with self._wake:
            if request.request_id in self._live:
                raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
            self._submit(request)
            self._live.add(request.request_id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences, after the step that runs. Unknown ids are no error."""
        with self._wake, contextlib.suppress(EngineDeadError):  # if nothing runs any more, that is what was asked for
            self._submit(_Abort(request_id, index))

    async def generate(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream one request's growing output; closing the generator early aborts it.

        Yields:
            The same RequestOutput, grown by at least one token each time; the last one is `finished`.
        """
        request = self._make_request(prompt, sampling_params, request_id)
        builder = RequestOutputBuilder(
            request,
            self.model_config.eos_token_ids,
            self._engine.tokenizer,
            prompt if isinstance(prompt, str) else None,
        )
        queue: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        # Before anything is registered under it: an id in use belongs to another caller, whose request must not suffer.
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        self._streams[request.request_id] = (asyncio.get_running_loop(), queue)
        try:
            self.add_request(request)
            while not builder.output.finished:
                outputs = [await queue.get()]
                while not queue.empty():
                    outputs.append(queue.get_nowait())
                for output in outputs:
                    if output.finish_reason == "error":
                        if output.error is not None:
                            raise output.error
                        raise EngineDeadError("the engine failed while this request ran")
                    if builder.add(output):
                        self.abort(request.request_id, output.index)
                yield builder.output
        finally:
            del self._streams[request.request_id]
            self.abort(request.request_id)

    def stats(self) -> EngineStats:
        """Load as of the last step. Any thread may call it."""
        return self._stats

    def accounts(self) -> EngineAccounts:
        """Load and memory, a second old at most; of an idle engine, as they are. Any thread may call it."""
        return self._accounts

    def check_health(self) -> None:
        """Raise EngineDeadError if the engine thread has ended, a rank is lost, or there is work and no step ends."""
        self._engine.check_health()
        if self._error is not None:
            raise EngineDeadError(f"the engine failed: {self._error!r}")
        if self._thread is None or not self._thread.is_alive():
            raise EngineDeadError("the engine is not running")
        due_since = self._step_due_since
        if due_since is not None and (waited_s := time.monotonic() - due_since) > HANG_S:
            raise EngineDeadError(f"the engine has work but has completed no step for {waited_s:.0f} s")

    def _make_request(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams, request_id: str | None
    ) -> EngineRequest:
        if isinstance(prompt, str):
            if self._engine.tokenizer is None:
                raise ConfigError(f"model {self.model_id} has no tokenizer; pass token ids")
            prompt = self._engine.tokenizer.encode(prompt)
        return EngineRequest(request_id or f"request-{next(self._request_ids)}", prompt, sampling_params)

    def _submit(self, command: EngineRequest | _Abort) -> None:
        """Queue a command. The caller holds `_wake`."""
        if self._error is not None or self._stopping or self._thread is None:
            raise EngineDeadError("the engine is not running")
        self._commands.append(command)
        self._wake.notify()

    # On the engine thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step_due_since = self._step_due_since or time.monotonic()
                num_steps = self._stats.num_steps
                outputs = self._apply_commands()
                outputs += self._engine.step()
                self._publish(outputs)
                if self._stats.num_steps > num_steps or not self._engine.has_unfinished_requests:
                    self._step_due_since = None
        except BaseException as error:
            logger.exception("the engine failed")
            self._error = error
        with self._wake:
            self._stopping = True
            abandoned = self._abandon()
        self._publish(abandoned)

    def _wait_for_work(self) -> bool:
        """False once the engine is to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._commands or self._stopping or self._engine.has_unfinished_requests)
            return not self._stopping

    def _apply_commands(self) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, _Abort):
                outputs += self._engine.abort(command.request_id, command.index)
            else:
                self._engine.add_request(command)
        return outputs

    def _abandon(self) -> list[SequenceOutput]:
        reason: FinishReason = "abort" if self._error is None else "error"
        outputs = self._engine.abort_all(reason)
        for command in self._commands:
            if isinstance(command, EngineRequest):
                outputs += [
                    SequenceOutput(command.request_id, index, [], finish_reason=reason)
                    for index in range(command.sampling_params.n)
                ]
                outputs[-1].request_finished = True
        self._commands.clear()
        return outputs

    def _publish(self, outputs: list[SequenceOutput]) -> None:
        before, self._stats = self._stats, self._engine.stats()
        now_s = time.monotonic()
        if now_s >= self._accounts_due_s or not self._engine.has_unfinished_requests:
            self._accounts = EngineAccounts(self._stats, self._engine.memory_usage())
            self._accounts_due_s = now_s + ACCOUNTS_INTERVAL_S
        if self._on_blocks is not None and (changes := self._engine.take_block_changes()) is not None:
            self._on_blocks(changes)
        if not outputs:
            if self._on_step is not None and self._stats.num_steps != before.num_steps:
                self._on_step(outputs)
            return
        with self._wake:
            self._live.difference_update(output.request_id for output in outputs if output.request_finished)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                loop, queue = stream
                loop.call_soon_threadsafe(queue.put_nowait, output)
        if self._on_step is not None:
            self._on_step(outputs)


class _Abort:
    __slots__ = ("index", "request_id")

    def __init__(self, request_id: str, index: int | None) -> None:
        self.request_id = request_id
        self.index = index
