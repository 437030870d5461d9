"""What an engine gives back: a step's new tokens (SequenceOutput), and what callers of LLM see (RequestOutput)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from engine.adapters import NO_ADAPTERS, AdapterStats
from engine.errors import QuireError

if TYPE_CHECKING:
    from engine.memory import MemoryUsage

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one output position, under the model's own distribution.

    `top` lists (token id, log-probability), most likely first; the drawn token is in it only if it is that likely.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class SequenceOutput:
    """What one step added to one sequence. The engine's unit of streaming: plain data, no text.

    Attributes:
        request_id: of the request.
        index: of the sequence within its request, from 0 to n - 1.
        token_ids: new output tokens, usually one; a stop token that ended the sequence is included.
        logprobs: one entry a token if the request asked for them, else None.
        finish_reason: set on the sequence's last output; "error" if the engine failed, or this request did.
        error: what failed if it was this request alone.
        stop_token_id: the id that ended the sequence, if a stop or end-of-sequence token did.
        num_cached_tokens: prompt tokens that came from the prefix cache; set with the sequence's first tokens.
        waited_s: from the request's arrival to its first step; set with the sequence's first tokens.
        request_finished: this is the request's last output.
        cumulative_logprob: of the whole sequence; set on the last output of one that was ranked against others.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    request_finished: bool = False
    cumulative_logprob: float | None = None
    waited_s: float = 0.0
    error: QuireError | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's completions, as far as it has come.

    Attributes:
        cumulative_logprob: sum of the drawn tokens' log-probabilities; None unless `logprobs` was asked for.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence and length.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """One request's prompt and completions. `finished` once every completion has its finish reason."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine's load, taken between two steps. Blocks are KV blocks of the pool.

    `num_waiting` counts requests, the `num_swapped` ones included; `num_preemptions` the `num_swaps`, the others having
    been recomputations. `num_waiting_tokens` are prompt tokens yet to be computed: of waiting requests all that the
    prefix cache does not hold now, of running ones what is left. `num_empty_blocks` are the free ones in which nothing
    is cached. All steps' seconds went into `schedule_s` (choosing the batch), `execute_s` (waiting for the device) and
    `process_s` (taking its tokens over).
    """

    num_blocks: int
    num_free_blocks: int
    num_waiting: int
    num_running: int
    num_waiting_tokens: int
    num_running_tokens: int
    num_preemptions: int
    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_swapped: int = 0
    num_free_swap_blocks: int = 0
    num_swaps: int = 0
    num_empty_blocks: int = 0
    num_swap_blocks: int = 0
    schedule_s: float = 0.0
    execute_s: float = 0.0
    process_s: float = 0.0
    adapters: AdapterStats = NO_ADAPTERS


class EngineAccounts(NamedTuple):
    """An engine's load and what its KV pool is held for, both at the same moment between two steps."""

    stats: EngineStats
    memory: MemoryUsage
