"""LLMEngine: one step is schedule, execute, process."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING

from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.errors import RequestError
from engine.execution.executor import Executor
from engine.memory import MemoryUsage, make_kv_cache, measure_memory, root_hash
from engine.outputs import EngineStats, FinishReason, SequenceOutput, TokenLogprobs
from engine.progress import Progress
from engine.request import EngineRequest, ResumedSequence
from engine.scheduling import SCHEDULERS, SampledToken, SchedulerOutput
from engine.sequence import Sequence, SequenceGroup
from engine.validation import RequestValidator, resolve_max_model_len

if TYPE_CHECKING:
    from engine.tokenization import Tokenizer


class LLMEngine:
    """The synchronous engine. Not thread-safe: one thread adds, steps and aborts; AsyncLLMEngine is that thread.

    Args:
        executor: runs the steps; anything that follows the Executor protocol, so that tests and simulations can
            bring a device of their own.
        tokenizer: kept for callers; the engine itself works on token ids alone. None for models without one.
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
    ) -> None:
        self.model_config = model_config
        self.config = config
        self.cache_config = cache_config
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.max_model_len = resolve_max_model_len(config, model_config, cache_config.num_blocks)
        self._executor = executor
        self._validator = RequestValidator(model_config, config, cache_config, self.max_model_len)
        self._kv_cache = make_kv_cache(config, cache_config, self.max_model_len)
        self._scheduler = SCHEDULERS[config.batching](config, self._kv_cache)
        self._groups: dict[str, SequenceGroup] = {}
        self._seqs: dict[int, tuple[SequenceGroup, Sequence]] = {}
        self._request_count = itertools.count()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    @classmethod
    def from_options(
        cls, model: str, config: EngineConfig | None = None, progress: Progress | None = None
    ) -> LLMEngine:
        """Load a checkpoint and build the engine for it.

        Args:
            model: a source: a folder, `package:NAME`, `dummy:NAME_OR_CONFIG`.
            progress: told how far the loading of weights has come.

        Raises:
            ModelLoadError: the checkpoint is missing, corrupt or not supported.
            ConfigError: the options contradict the checkpoint or the machine.
        """
        from engine.build import build_engine  # brings in torch, which an engine with another executor does not need

        return build_engine(model, config or EngineConfig(), progress)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._groups)

    def validate(self, request: EngineRequest) -> None:
        """Raise RequestError if the request could never be served. Any thread may call it."""
        self._validator.check(request)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. It may be half done: `resumed` holds what it produced elsewhere.

        Raises:
            RequestError: it could never be served, or its id is in use.
        """
        self.validate(request)
        if request.request_id in self._groups:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        params = request.sampling_params
        resumed = request.resumed or (ResumedSequence(),) * params.n
        group = SequenceGroup(
            request.request_id,
            [_new_sequence(request, index, item) for index, item in enumerate(resumed)],
            params,
            params.seed if params.seed is not None else self._next_seed(),
            root_hash(self.model_config.fingerprint, salt=request.cache_salt),
            request.arrival_time,
        )
        if group.is_finished:
            raise RequestError("every resumed sequence is finished", param="resumed")
        self._groups[request.request_id] = group
        for seq in group.live_seqs:
            self._seqs[seq.seq_id] = (group, seq)
        self._scheduler.add(group)
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> list[SequenceOutput]:
        """End a request, or one of its sequences, and free its blocks at once. Unknown ids are no error.

        Returns:
            The last output of each sequence that this ended.
        """
        group = self._groups.get(request_id)
        if group is None:
            return []
        outputs = []
        for seq in group.live_seqs:
            if index is None or seq.index == index:
                self._finish(group, seq, reason)
                outputs.append(self._output(group, seq, []))
        if group.is_finished:
            self._remove(group)
        if outputs:
            outputs[-1].request_finished = group.is_finished
        return outputs

    def abort_all(self, reason: FinishReason) -> list[SequenceOutput]:
        """End every request."""
        return [output for request_id in list(self._groups) for output in self.abort(request_id, reason=reason)]

    def step(self) -> list[SequenceOutput]:
        """Compute one batch and return the tokens it gave. Empty when there is nothing to do."""
        output = self._scheduler.schedule()
        if output.is_empty:
            return []
        sampled = self._executor.execute(output)
        return self._process(output, sampled)

    def stats(self) -> EngineStats:
        waiting, running = self._scheduler.waiting, self._scheduler.running
        return EngineStats(
            num_blocks=self.cache_config.num_blocks,
            num_free_blocks=self._kv_cache.num_free_blocks,
            num_waiting=len(waiting),
            num_running=len(running),
            num_waiting_tokens=sum(group.num_uncomputed_tokens for group in waiting),
            num_running_tokens=sum(seq.num_computed_tokens for group in running for seq in group.live_seqs),
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def memory_usage(self) -> MemoryUsage:
        """What the KV pool's slots are held for, between two steps. O(running sequences)."""
        return measure_memory(self._kv_cache, self._scheduler.running, self._scheduler.waiting, self.max_model_len)

    def check_invariants(self) -> None:
        """Raise AssertionError if a KV block is lost or miscounted."""
        self._kv_cache.check_invariants()
        if not self._groups:
            assert self._kv_cache.num_free_blocks == self.cache_config.num_blocks, "blocks held by no request"

    def reset_prefix_cache(self) -> None:
        self._kv_cache.reset_prefix_cache()

    def _process(self, output: SchedulerOutput, sampled: list[SampledToken]) -> list[SequenceOutput]:
        self._num_steps += 1
        for item in output.scheduled:
            group, seq = self._seqs[item.seq_id]
            self._scheduler.advance(group, seq, len(item.token_ids))
        outputs = []
        for token in sampled:
            group, seq = self._seqs[token.seq_id]
            outputs.append(self._append(group, seq, token))
            if group.is_finished:
                outputs[-1].request_finished = True
                self._remove(group)
        self._num_output_tokens += len(sampled)
        return outputs

    def _append(self, group: SequenceGroup, seq: Sequence, token: SampledToken) -> SequenceOutput:
        wants_logprobs = group.sampling_params.logprobs is not None
        seq.append_token(token.token_id, token.logprob if wants_logprobs else 0.0)
        reason = self._finish_reason(group, seq, token.token_id)
        if reason is not None:
            self._finish(group, seq, reason, token.token_id if reason == "stop" else None)
        logprobs = [TokenLogprobs(token.logprob, token.top)] if wants_logprobs else None
        return self._output(group, seq, [token.token_id], logprobs)

    def _finish_reason(self, group: SequenceGroup, seq: Sequence, token_id: int) -> FinishReason | None:
        params = group.sampling_params
        if seq.num_output_tokens >= params.min_tokens:
            is_eos = not params.ignore_eos and token_id in self.model_config.eos_token_ids
            if is_eos or token_id in params.stop_token_ids:
                return "stop"
        if seq.num_output_tokens == params.max_tokens or seq.num_tokens == self.max_model_len:
            return "length"
        return None

    def _finish(
        self, group: SequenceGroup, seq: Sequence, reason: FinishReason, stop_token_id: int | None = None
    ) -> None:
        self._scheduler.release(group, seq)
        seq.finish(reason, stop_token_id)
        del self._seqs[seq.seq_id]

    def _remove(self, group: SequenceGroup) -> None:
        self._scheduler.remove(group)
        del self._groups[group.request_id]

    def _output(
        self,
        group: SequenceGroup,
        seq: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None = None,
    ) -> SequenceOutput:
        return SequenceOutput(
            request_id=group.request_id,
            index=seq.index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=seq.finish_reason,
            stop_token_id=seq.stop_token_id,
            num_cached_tokens=max(0, group.num_cached_tokens),
        )

    def _next_seed(self) -> int:
        """A seed for a request that brings none: a function of the engine's seed and the request's number."""
        count = next(self._request_count)
        digest = hashlib.blake2b(count.to_bytes(8, "little"), digest_size=8, key=self.config.seed.to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")


def _new_sequence(request: EngineRequest, index: int, resumed: ResumedSequence) -> Sequence:
    seq = Sequence(request.prompt_token_ids, index)
    for token_id in resumed.token_ids:
        seq.append_token(token_id, 0.0)
    seq.cumulative_logprob = resumed.cumulative_logprob
    if resumed.finished:
        seq.finish("stop")
    return seq
