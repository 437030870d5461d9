"""Sequences and sequence groups: what a request is while the engine works on it."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from engine.decoding.beam_search import BeamSearch
from engine.int32_buffer import Int32Array, Int32Buffer
from engine.outputs import FinishReason, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.timeline import RequestTimeline

# Stands in `Sequence.token_ids` for a token that the device is drawing, or has drawn and not yet told.
PLACEHOLDER = -1


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()  # no blocks; not yet admitted, or preempted for recomputation
    RUNNING = enum.auto()  # holds blocks, or will when its group forks
    SWAPPED = enum.auto()  # holds blocks of the host pool
    FINISHED = enum.auto()  # has a finish_reason; holds nothing


_seq_ids = itertools.count()


class Sequence:
    """One run of tokens: the prompt, then what was drawn.

    There is no prefill or decode phase: each step `num_computed_tokens` chases `num_tokens`, and when it catches up,
    the next token is drawn.

    Attributes:
        seq_id: unique in the process.
        index: within its group, from 0; the sample index of the counter-based generator.
        num_prompt_tokens: where the output starts; survives preemption.
        num_computed_tokens: leading tokens whose K and V are in the cache, once the steps in flight have run.
        num_placeholders: tokens at the end that are in flight, at most one for each step in flight.
        block_hashes: chained hashes of leading full blocks, as far as they were needed.
        cumulative_logprob: of the output tokens, under the model's own distribution.
        logprobs: of each output token, kept only where the output is withheld until sequences are ranked.
    """

    __slots__ = (
        "_tokens",
        "block_hashes",
        "cumulative_logprob",
        "finish_reason",
        "index",
        "logprobs",
        "num_computed_tokens",
        "num_placeholders",
        "num_prompt_tokens",
        "seq_id",
        "status",
        "stop_token_id",
    )

    def __init__(self, prompt_token_ids: SequenceOf[int] | Int32Array, index: int = 0) -> None:
        self.seq_id = next(_seq_ids)
        self.index = index
        self._tokens = Int32Buffer(prompt_token_ids, capacity=64)
        self.num_prompt_tokens = len(self._tokens)
        self.num_computed_tokens = 0
        self.num_placeholders = 0
        self.block_hashes: list[bytes] = []
        self.cumulative_logprob = 0.0
        self.logprobs: list[TokenLogprobs] = []
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None

    @property
    def num_tokens(self) -> int:
        """Those in flight included."""
        return len(self._tokens)

    @property
    def num_known_tokens(self) -> int:
        """Those in flight left out."""
        return len(self._tokens) - self.num_placeholders

    @property
    def num_output_tokens(self) -> int:
        """Known ones."""
        return self.num_known_tokens - self.num_prompt_tokens

    @property
    def token_ids(self) -> Int32Array:
        """int32 `[num_tokens]`, PLACEHOLDER where one is in flight; a view, valid until the next append."""
        return self._tokens.view

    @property
    def output_token_ids(self) -> Int32Array:
        """int32 `[num_output_tokens]`."""
        return self._tokens.view[self.num_prompt_tokens : self.num_known_tokens]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int, logprob: float) -> None:
        """Add a drawn token; it takes the place of the oldest placeholder, if there is one."""
        if self.num_placeholders:
            self._tokens[self.num_known_tokens] = token_id
            self.num_placeholders -= 1
        else:
            self._tokens.append(token_id)
        self.cumulative_logprob += logprob

    def expect_token(self) -> None:
        """Add a placeholder for a token that a step in flight draws, so that the next step can go on from it."""
        self._tokens.append(PLACEHOLDER)
        self.num_placeholders += 1

    def fork(self) -> Sequence:
        """A sequence with the same tokens so far (§4.4). Its blocks are the KV cache manager's affair."""
        assert not self.num_placeholders, "a fork of tokens that nobody knows"
        child = Sequence(self.token_ids, self.index)
        child.num_prompt_tokens = self.num_prompt_tokens
        child.cumulative_logprob = self.cumulative_logprob
        child.logprobs = self.logprobs.copy()
        child.status = self.status
        return child

    def finish(self, reason: FinishReason, stop_token_id: int | None = None) -> None:
        """What is in flight still is discarded."""
        self._tokens.truncate(self.num_known_tokens)
        self.num_placeholders = 0
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_token_id = stop_token_id


class PreemptedBlocks(NamedTuple):
    """What a group lost when it was preempted: blocks to copy back or to compute again, and of them, others' too."""

    num_blocks: int
    num_held_by_others: int


class SequenceGroup:
    """The sequences of one request, scheduled and preempted together (§4.5).

    Until `is_forked`, only the first live sequence, the trunk, holds blocks: it computes the tokens that all share,
    up to `fork_point`; then the others fork its block table (§4.4). A new group's trunk is the prompt. A preempted
    group's is the longest common prefix of its sequences, so recomputation rebuilds the tree, sharing included.

    A beam search starts as one sequence, the prompt; its beams come and go. They advance in lockstep: none computes
    the token that its next draw needs before all can.

    Attributes:
        seqs: all of them, but for beams that were dropped.
        live_seqs: those that have not ended; a list of its own after each end, so that it can be iterated meanwhile.
        seed: of this request's draws.
        root_hash: the start of its block-hash chain.
        adapter: the name of its LoRA adapter; "" is the base.
        adapter_slot: where that is resident, from the group's first admission to its end; None before, -1 for the base.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission; -1 before it.
        num_prefix_blocks: where the last look at the prefix cache found its cached prefix to end; a waiting group's.
        started_at: when its first step began, in the engine's clock; None before.
        num_steps_in_flight: steps handed to the device and not yet collected that this group takes part in.
        preempted_blocks: of its last preemption, where the preemption policy wants to know.
        beam_search: its state, or None for sampling.
        timeline: to be kept, for requests that ask.
    """

    __slots__ = (
        "adapter",
        "adapter_slot",
        "arrival_time",
        "beam_search",
        "fork_point",
        "is_forked",
        "live_seqs",
        "num_cached_tokens",
        "num_preemptions",
        "num_prefix_blocks",
        "num_steps_in_flight",
        "preempted_blocks",
        "request_id",
        "root_hash",
        "sampling_params",
        "seed",
        "seqs",
        "started_at",
        "timeline",
    )

    def __init__(
        self,
        request_id: str,
        seqs: list[Sequence],
        sampling_params: SamplingParams,
        seed: int,
        root_hash: bytes,
        arrival_time: float,
        adapter: str = "",
        timeline: RequestTimeline | None = None,
    ) -> None:
        assert seqs
        self.request_id = request_id
        self.seqs = seqs
        self.live_seqs = [seq for seq in seqs if not seq.is_finished]
        self.sampling_params = sampling_params
        self.seed = seed
        self.root_hash = root_hash
        self.arrival_time = arrival_time
        self.adapter = adapter
        self.adapter_slot: int | None = None
        self.num_cached_tokens = -1
        self.num_prefix_blocks = 0
        self.started_at: float | None = None
        self.timeline = timeline
        self.num_preemptions = 0
        self.num_steps_in_flight = 0
        self.preempted_blocks: PreemptedBlocks | None = None
        self.beam_search = BeamSearch(sampling_params) if sampling_params.use_beam_search else None
        self.is_forked = False
        self.fork_point = 0
        self.reset_trunk()

    @property
    def is_finished(self) -> bool:
        return not self.live_seqs

    @property
    def is_swapped(self) -> bool:
        return any(seq.status is SequenceStatus.SWAPPED for seq in self.seqs)

    @property
    def num_seats(self) -> int:
        """Sequences that must be able to run at once: a beam search needs its width from the start."""
        return self.sampling_params.width if self.beam_search is not None else len(self.live_seqs)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to compute before every live sequence can draw its next one."""
        if self.is_forked:
            return sum(seq.num_tokens - seq.num_computed_tokens for seq in self.live_seqs)
        live = self.live_seqs
        tails = sum(seq.num_tokens - self.fork_point for seq in live)
        return self.fork_point - live[0].num_computed_tokens + tails

    @property
    def waited_s(self) -> float:
        """From its arrival to its first step; 0 before that."""
        return 0.0 if self.started_at is None else max(0.0, self.started_at - self.arrival_time)

    @property
    def num_trunk_tokens_left(self) -> int:
        """Tokens of the prompt, or of what is rebuilt after a preemption, that a running group has yet to compute."""
        return 0 if self.is_forked or self.is_finished else self.fork_point - self.live_seqs[0].num_computed_tokens

    def fork(self, parent: Sequence) -> Sequence:
        """Add a beam that goes on from `parent`'s tokens."""
        child = parent.fork()
        self.seqs.append(child)
        self.live_seqs.append(child)
        return child

    def finish(self, seq: Sequence, reason: FinishReason, stop_token_id: int | None = None) -> None:
        """End one live sequence."""
        seq.finish(reason, stop_token_id)
        self.live_seqs = [other for other in self.live_seqs if other is not seq]

    def forget_dropped_beams(self) -> None:
        """Keep only live sequences: what a search has found, it keeps itself."""
        self.seqs = self.live_seqs.copy()

    def reset_trunk(self) -> None:
        """Forget all computed tokens and find the trunk anew: at the start, and after preemption."""
        live = self.live_seqs
        for seq in live:
            seq.num_computed_tokens = 0
        self.fork_point = self.common_prefix_length()
        self.is_forked = False

    def common_prefix_length(self) -> int:
        """Leading tokens that all live sequences share."""
        return _common_prefix_length([seq.token_ids for seq in self.live_seqs])

    def seqs_to_compute(self) -> list[Sequence]:
        """Live sequences that hold blocks now: the trunk alone, or all of them once forked."""
        live = self.live_seqs
        return live if self.is_forked else live[:1]

    def compute_targets(self) -> list[tuple[Sequence, int]]:
        """The sequences that hold blocks now, each with how far it may be computed for now."""
        if not self.is_forked:
            return [(self.live_seqs[0], self.fork_point)]
        if self.beam_search is not None and not self.is_caught_up:
            return [(seq, seq.num_tokens - 1) for seq in self.live_seqs]
        return [(seq, seq.num_tokens) for seq in self.live_seqs]

    @property
    def is_caught_up(self) -> bool:
        """Every live sequence lacks only its last token, from which the next one is drawn."""
        return all(seq.num_computed_tokens >= seq.num_tokens - 1 for seq in self.live_seqs)


def _common_prefix_length(sequences: list[Int32Array]) -> int:
    if not sequences:
        return 0
    first = sequences[0]
    length = min(len(tokens) for tokens in sequences)
    for tokens in sequences[1:]:
        differing = np.flatnonzero(first[:length] != tokens[:length])
        if differing.size:
            length = int(differing[0])
    return length
