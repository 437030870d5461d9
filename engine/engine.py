"""LLMEngine: one step is schedule, execute, process."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from engine.adapters import AdapterLoader, AdapterManager, AdapterStats
from engine.config import CacheConfig, EngineConfig, check_adapter_name
from engine.errors import ConfigError, RequestError
from engine.execution.executor import Executor
from engine.execution.sample_rows import stays_on_device
from engine.live_requests import LiveRequests
from engine.memory import BlockChanges, BlockEvents, MemoryUsage, make_kv_cache, measure_memory, root_hash
from engine.model_config import ModelConfig
from engine.outputs import EngineStats, FinishReason, SequenceOutput
from engine.pipeline import CollectedStep, Pipeline, make_pipeline
from engine.preemption import PreemptionPolicy
from engine.progress import Progress
from engine.ranking import StopRules
from engine.request import EngineRequest
from engine.request_group import make_group
from engine.scheduling import SCHEDULERS, SchedulerOutput
from engine.sequence import SequenceGroup
from engine.shared_prefix import pin_prefix, prefix_tokens
from engine.timeline import RequestTimeline
from engine.validation import RequestValidator, resolve_max_model_len

if TYPE_CHECKING:
    from engine.control import WorkerLauncher
    from engine.tokenization import Tokenizer


# How long an engine that has nothing else to do waits for an adapter before it looks for new requests.
LOAD_POLL_S = 0.005


class _TimedChunk(NamedTuple):
    """What a step on the device computes for a request that keeps a timeline and does not decode yet."""

    output: SchedulerOutput
    timeline: RequestTimeline
    began: float
    num_tokens: int
    draws: bool


class LLMEngine:
    """The synchronous engine. Not thread-safe: one thread adds, steps and aborts; AsyncLLMEngine is that thread.

    Args:
        executor: runs the steps; anything that follows the Executor protocol, so that tests and simulations can
            bring a device of their own.
        tokenizer: kept for callers; the engine works on token ids, but for the stop strings of ranked requests.
            None for models without one.
        clock: seconds; a simulated device brings its own.
    """

    def __init__(
        self,
        executor: Executor,
        model_config: ModelConfig,
        config: EngineConfig,
        cache_config: CacheConfig,
        *,
        model_id: str = "model",
        tokenizer: Tokenizer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model_config = model_config
        self.config = config
        self.cache_config = cache_config
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.max_model_len = resolve_max_model_len(config, model_config, cache_config.num_blocks)
        self._executor = executor
        self._kv_cache = make_kv_cache(config, cache_config, self.max_model_len)
        self._adapters = AdapterManager(
            config.max_loras if config.enable_lora else 0,
            config.adapter_memory,
            executor.adapter_bytes,
            AdapterLoader(executor.prepare_adapter if config.enable_lora else None),
        )
        for name, source in config.adapters.items():
            self.add_adapter(name, source)
        self._validator = RequestValidator(
            model_config,
            config,
            cache_config,
            self.max_model_len,
            lambda: self._kv_cache.num_pinned_blocks,
            tokenizer is not None,
            self._adapters,
        )
        self._policy = PreemptionPolicy(config.preemption, self._kv_cache, cache_config, executor.swap_cost)
        self._scheduler = SCHEDULERS[config.batching](config, self._kv_cache, self._policy, self._adapters)
        self._stop_rules = StopRules(model_config.eos_token_ids, self.max_model_len, tokenizer)
        self._clock = clock
        self._pipeline = make_pipeline(config.async_scheduling, executor, clock)
        self._block_events: BlockEvents | None = None
        self._live = LiveRequests(self._scheduler, self._kv_cache, self._stop_rules, clock)
        self._timed_chunks: deque[_TimedChunk] = deque()
        self._failed: list[SequenceOutput] = []  # last outputs of requests that fail alone, for the step's end
        self._request_count = itertools.count()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._schedule_s = self._execute_s = self._process_s = 0.0

    @classmethod
    def from_options(
        cls,
        model: str,
        config: EngineConfig | None = None,
        progress: Progress | None = None,
        launcher: WorkerLauncher | None = None,
    ) -> LLMEngine:
        """Load a checkpoint and build the engine for it.

        Args:
            model: a source: a folder, `package:NAME`, `dummy:NAME_OR_CONFIG`.
            progress: told how far the loading of weights has come.
            launcher: starts the other ranks of tensor parallelism; by default as processes of this machine.

        Raises:
            ModelLoadError: the checkpoint is missing, corrupt or not supported.
            ConfigError: the options contradict the checkpoint or the machine.
            CommunicatorError: another rank did not come, or died.
        """
        config = config or EngineConfig()
        if config.simulated_device is not None:
            from engine.execution.simulated_build import build_on_simulated_device
            from engine.loading import open_checkpoint

            return build_on_simulated_device(open_checkpoint(model), config)
        from engine.build import build_engine  # brings in torch, which an engine with another executor does not need

        return build_engine(model, config, progress, launcher)

    def pin_shared_prefixes(self) -> None:
        """Compute and pin the configured prefixes. Called once, when the executor can run.

        Raises:
            ConfigError: one is no text or tokens of this model, is shorter than a block, or leaves no room for
                `max_model_len`.
        """
        for name, prefix in self.config.shared_prefixes.items():
            token_ids = prefix_tokens(
                name, prefix, self.tokenizer, self.model_config.vocab_size, self.config.block_size, self.max_model_len
            )
            left = self._kv_cache.num_free_blocks - len(token_ids) // self.config.block_size
            if left < self.cache_config.blocks_for(self.max_model_len):
                raise ConfigError(
                    f"shared_prefixes.{name}: its {len(token_ids)} tokens leave {left} KV blocks, too few for "
                    f"max_model_len={self.max_model_len}"
                )
            pin_prefix(
                self._executor,
                self._kv_cache,
                token_ids,
                root_hash(self.model_config.fingerprint),
                self.config.block_size,
                self.config.max_num_batched_tokens,
            )

    def add_adapter(self, name: str, source: str) -> None:
        """Read and check a PEFT folder, and take requests for it from now on. Any thread may call it.

        A name stays its adapter's as long as the engine lives: adding the same source again changes nothing.

        Args:
            source: a folder, "s3://BUCKET/PREFIX" or "hf:ORG/NAME", fetched to this node now.

        Raises:
            ModelLoadError: no adapter of this base, or its rank is above `max_lora_rank`.
            ConfigError: the engine takes no adapters, it exceeds `adapter_memory`, or the name is taken or malformed.
        """
        if not self.config.enable_lora:
            raise ConfigError(f"adapter {name}: this engine takes no adapters; set enable_lora=true")
        check_adapter_name(name)
        self._adapters.register(self._executor.read_adapter(name, source))

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that requests may name."""
        return self._adapters.names

    def adapter_stats(self) -> AdapterStats:
        """What is resident now, and how often adapters were loaded and evicted."""
        return self._adapters.stats()

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._live) or bool(self._pipeline)

    @property
    def schedules_ahead(self) -> bool:
        """Whether each step is prepared while the one before it runs: `async_scheduling`, resolved."""
        return self._pipeline is not None

    def validate(self, request: EngineRequest) -> None:
        """Raise RequestError if the request could never be served. Any thread may call it."""
        self._validator.check(request)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. It may be half done: `resumed` holds what it produced elsewhere.

        Raises:
            RequestError: it could never be served, or its id is in use.
        """
        self.validate(request)
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        seed = request.sampling_params.seed
        self._live.add(
            make_group(
                request,
                self._next_seed() if seed is None else seed,
                root_hash(self.model_config.fingerprint, request.adapter, request.cache_salt),
            )
        )
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> list[SequenceOutput]:
        """End a request, or one of its sequences, and free its blocks at once, or once the step that has them in use is
        collected. Unknown ids are no error.

        Returns:
            The last output of each sequence that this ended.
        """
        return self._live.abort(request_id, index, reason)

    def abort_all(self, reason: FinishReason) -> list[SequenceOutput]:
        """End every request."""
        return [output for request_id in self._live.request_ids for output in self.abort(request_id, reason=reason)]

    def step(self) -> list[SequenceOutput]:
        """Compute one batch and return the tokens it gave. Empty when there is nothing to do, or all that is to be done
        waits for an adapter: then after a moment, so that what has arrived meanwhile can be queued."""
        outputs = self._step_once() if self._pipeline is None else self._step_ahead(self._pipeline)
        if self._failed:
            outputs = [*self._failed, *outputs]
            self._failed = []
        return outputs

    def _step_once(self) -> list[SequenceOutput]:
        due = self._clock()
        output = self._schedule()
        if output.is_empty:
            self._await_adapter()
            return []
        began = self._clock()
        drawn = self._executor.execute(output)
        self._advance(output, began)
        ended = self._clock()
        self._schedule_s += began - due
        self._execute_s += ended - began
        return self._process_timed(CollectedStep(output, drawn, ended - began), ended)

    def _step_ahead(self, pipeline: Pipeline) -> list[SequenceOutput]:
        """Wait for the batch that runs, having prepared the next one."""
        due = self._clock()
        while len(pipeline) < Pipeline.DEPTH:
            output = self._schedule()
            if output.is_empty:
                break
            began = self._clock()
            pipeline.submit(output, self._groups_of(output))
            self._advance(output, began)
            self._expect_tokens(output)
        if not pipeline:
            self._await_adapter()
            return []
        prepared = self._clock()
        step = pipeline.collect()
        ended = self._clock()
        self._schedule_s += prepared - due
        self._execute_s += ended - prepared
        self._scheduler.free_leaving()
        for item in step.output.scheduled:
            found = self._live.find(item.seq_id)
            if found is not None:
                self._scheduler.cache_blocks(*found)
        return self._process_timed(step, ended)

    def _schedule(self) -> SchedulerOutput:
        output = self._scheduler.schedule()
        for group in self._scheduler.preempted:
            if group.timeline is not None:
                group.timeline.preempted(self._clock(), swapped=group.is_swapped)
        for group, error in self._scheduler.failed:
            ended = self.abort(group.request_id, reason="error")
            for last in ended:
                last.error = error
            self._failed += ended
        return output

    def _await_adapter(self) -> None:
        """Nothing can be computed. Whoever has been told so waits no longer."""
        if not self._failed:
            self._adapters.wait_for_load(LOAD_POLL_S)

    def _groups_of(self, output: SchedulerOutput) -> tuple[SequenceGroup, ...]:
        groups = {id(group): group for group, _ in (self._live.sequence(item.seq_id) for item in output.scheduled)}
        return tuple(groups.values())

    def _advance(self, output: SchedulerOutput, began: float) -> None:
        for item in output.scheduled:
            group, seq = self._live.sequence(item.seq_id)
            if group.started_at is None:
                group.started_at = began
            timeline = group.timeline
            if timeline is not None and not timeline.is_decoding:
                timeline.started(began)
                self._timed_chunks.append(_TimedChunk(output, timeline, began, len(item.token_ids), bool(item.samples)))
            self._scheduler.advance(group, seq, len(item.token_ids))

    def _expect_tokens(self, output: SchedulerOutput) -> None:
        """Let the sequences go on whose next token the device draws and keeps, but for those that end with it."""
        for item in output.scheduled:
            for request in item.samples:
                group, seq = self._live.sequence(request.seq_id)
                num_output = request.position + 1 - seq.num_prompt_tokens
                if stays_on_device(request) and num_output < self._stop_rules.max_output_tokens(group):
                    seq.expect_token()

    def stats(self) -> EngineStats:
        waiting, running = self._scheduler.waiting, self._scheduler.running
        left = sum(self._num_uncached_tokens(group) for group in waiting)
        left += sum(group.num_trunk_tokens_left for group in running)
        return EngineStats(
            num_blocks=self.cache_config.num_blocks,
            num_free_blocks=self._kv_cache.num_free_blocks,
            num_waiting=len(waiting),
            num_running=len(running),
            num_waiting_tokens=left,
            num_running_tokens=sum(seq.num_computed_tokens for group in running for seq in group.live_seqs),
            num_swapped=sum(group.is_swapped for group in waiting),
            num_free_swap_blocks=self._kv_cache.num_free_swap_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            num_swaps=self._scheduler.num_swaps,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_output_tokens=self._live.num_output_tokens,
            num_empty_blocks=self._kv_cache.num_empty_blocks,
            num_swap_blocks=self.cache_config.num_swap_blocks,
            schedule_s=self._schedule_s,
            execute_s=self._execute_s,
            process_s=self._process_s,
            adapters=self._adapters.stats(),
        )

    def _num_uncached_tokens(self, group: SequenceGroup) -> int:
        cached = 0 if group.is_swapped else self._kv_cache.num_cached_tokens(group)
        return group.num_uncomputed_tokens - cached

    def memory_usage(self) -> MemoryUsage:
        """What the KV pool's slots are held for, between two steps. O(running sequences)."""
        return measure_memory(self._kv_cache, self._scheduler.running, self._scheduler.waiting, self.max_model_len)

    def check_health(self) -> None:
        """Raise EngineDeadError if steps can no longer be run. Any thread may call it."""
        self._executor.check_health()

    def close(self) -> None:
        """End the processes of other ranks, if there are any. Idempotent."""
        self._adapters.close()
        self._executor.close()

    def check_invariants(self) -> None:
        """Raise AssertionError if a KV block is lost or miscounted."""
        self._kv_cache.check_invariants()
        self._adapters.check_invariants()
        if not self.has_unfinished_requests:
            held = self.cache_config.num_blocks - self._kv_cache.num_free_blocks
            assert held == self._kv_cache.num_pinned_blocks, "blocks held by no request"

    def watch_blocks(self) -> None:
        """Record which blocks are cached and dropped from now on, for `take_block_changes`."""
        self._block_events = self._kv_cache.watch_blocks()

    def take_block_changes(self) -> BlockChanges | None:
        """What the prefix cache gained and lost since the last call; None if nothing, or if nobody watches."""
        return self._block_events.take() if self._block_events is not None else None

    def reset_prefix_cache(self) -> None:
        self._kv_cache.reset_prefix_cache()

    def _process_timed(self, step: CollectedStep, ended: float) -> list[SequenceOutput]:
        while self._timed_chunks and self._timed_chunks[0].output is step.output:
            chunk = self._timed_chunks.popleft()
            chunk.timeline.computed(chunk.began, ended, chunk.num_tokens, draws=chunk.draws)
        outputs = self._process(step)
        self._process_s += self._clock() - ended
        return outputs

    def _process(self, step: CollectedStep) -> list[SequenceOutput]:
        """Give out what a step drew. What ended while it was in flight has no use for its tokens."""
        self._num_steps += 1
        output = step.output
        if not (output.blocks_to_swap_in or output.blocks_to_swap_out):
            self._policy.compute_cost.observe(output.num_tokens, output.num_context_tokens, step.seconds)
        outputs = []
        for token in step.drawn.tokens:
            outputs += self._live.append(token)
        for candidates in step.drawn.beams:
            outputs += self._live.search(candidates)
        return outputs

    def _next_seed(self) -> int:
        """A seed for a request that brings none: a function of the engine's seed and the request's number."""
        count = next(self._request_count)
        digest = hashlib.blake2b(count.to_bytes(8, "little"), digest_size=8, key=self.config.seed.to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")
