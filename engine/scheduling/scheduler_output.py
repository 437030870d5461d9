"""One step's work as plain data: all that workers need, so that they keep no allocation state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.adapters import NO_CHANGES, AdapterChanges
from engine.int32_buffer import Int32Array
from engine.memory import BlockCopy
from engine.sampling_params import SamplingParams


class SampleRequest(NamedTuple):
    """One token to draw from the logits of a scheduled sequence's last row.

    Attributes:
        seq_id: the sequence that the token goes to; differs from the row's own while a group's trunk is not forked.
        seed, sample_index, position: the key of the counter-based generator; `position` is the drawn token's.
        token_ids: int32 `[position]`, prompt and output so far, for penalties and `min_tokens`.
        cumulative_logprob: of the output so far. All live beams of a request draw in the same step, and their
            candidates are ranked together.
    """

    seq_id: int
    request_id: str
    sampling_params: SamplingParams
    seed: int
    sample_index: int
    position: int
    num_prompt_tokens: int
    token_ids: Int32Array
    cumulative_logprob: float


class ScheduledSequence(NamedTuple):
    """A run of one sequence's tokens to compute.

    Attributes:
        token_ids: int32 `[num_new]`, the tokens at positions `start` to `start + num_new - 1`.
        block_table: int32; covers the positions up to `start + num_new - 1`.
        samples: draws from the last row's logits; empty for a chunk that does not end its sequence.
        adapter_slot: where its LoRA adapter is resident; -1 for the base.
    """

    seq_id: int
    start: int
    token_ids: Int32Array
    block_table: Int32Array
    samples: tuple[SampleRequest, ...]
    adapter_slot: int = -1


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one step computes, in the order in which workers do it: adapters, copies, then all rows in one batch.

    Attributes:
        scheduled: sequences with at least one token each; their tokens are within the step's budget.
        blocks_to_swap_out: device block to host block, done first; never in one step with swap-ins.
        blocks_to_swap_in: host block to device block.
        blocks_to_copy: copies-on-write, done after the swaps, in order, before anything is written.
        adapters: which slots of adapters are emptied and filled.
    """

    scheduled: tuple[ScheduledSequence, ...]
    blocks_to_swap_out: tuple[BlockCopy, ...] = ()
    blocks_to_swap_in: tuple[BlockCopy, ...] = ()
    blocks_to_copy: tuple[BlockCopy, ...] = ()
    adapters: AdapterChanges = NO_CHANGES

    @property
    def num_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self.scheduled)

    @property
    def num_context_tokens(self) -> int:
        """What attention reads of the cache, summed over sequences."""
        return sum(item.start + len(item.token_ids) for item in self.scheduled)

    @property
    def is_empty(self) -> bool:
        return not (self.scheduled or self.blocks_to_swap_out or self.blocks_to_swap_in)


class SampledToken(NamedTuple):
    """A drawn token. `logprob` and `top` are under the model's own distribution (before bias, penalties, temperature).

    `logprob` is NaN and `top` empty unless the request asked for log-probabilities or ranks its sequences by them.
    """

    seq_id: int
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class BeamCandidate(NamedTuple):
    """One continuation of a live beam: which beam, by which token, and what the whole then weighs."""

    seq_id: int
    token_id: int
    logprob: float
    cumulative_logprob: float
    top: tuple[tuple[int, float], ...]


class BeamCandidates(NamedTuple):
    """The most likely continuations of one request's live beams, most likely first."""

    request_id: str
    candidates: tuple[BeamCandidate, ...]


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """What a step drew: a token for each sequence that samples, candidates for each request that searches."""

    tokens: tuple[SampledToken, ...] = ()
    beams: tuple[BeamCandidates, ...] = ()
