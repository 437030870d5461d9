"""What a request would cost on a replica, in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# What replicas are taken to do until one of them has measured itself: a small model on a few cores.
DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_DECODE_STEP_S = 0.02
DEFAULT_DECODE_SEQUENCE_S = 0.001


class RequestCost(NamedTuple):
    """What the balancer knows of a request.

    Attributes:
        prompt_tokens: to be computed, those that a resumed request had already produced included.
        output_tokens: expected of each of its `num_sequences`; `max_tokens` is the bound, not the expectation.
    """

    prompt_tokens: int
    output_tokens: int
    num_sequences: int = 1


class ReplicaLoad(NamedTuple):
    """A replica's last report with the bookings that it cannot yet know of added to it.

    Attributes:
        waiting_tokens: prompt tokens queued before a new request.
        num_sequences: sequences that decode, or will.
        num_bookings: requests of this ingress there.
    """

    replica_id: str
    waiting_tokens: int
    num_sequences: int
    free_blocks: int
    block_size: int
    prefill_tokens_per_s: float
    decode_step_s: float
    decode_sequence_s: float
    num_bookings: int


def cost_s(request: RequestCost, load: ReplicaLoad) -> float:
    """Seconds that this choice adds, to the request itself and to those that run there.

    - the wait for prompts queued before it, and its own prompt, at the measured prefill rate;
    - decoding: each sequence makes every step `decode_sequence_s` longer. The request's sequences lose that time to
      everyone who runs there, and everyone loses it to them, for as long as the request decodes;
    - blocks: what its prompt lacks must first be freed by sequences that end, one block per `block_size` steps of each.
    """
    rate = load.prefill_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S
    step_s = load.decode_step_s or DEFAULT_DECODE_STEP_S
    sequence_s = load.decode_sequence_s or DEFAULT_DECODE_SEQUENCE_S
    prefill_s = (load.waiting_tokens + request.prompt_tokens) / rate
    decode_s = 2 * request.output_tokens * request.num_sequences * load.num_sequences * sequence_s
    needed_blocks = -(-request.prompt_tokens // load.block_size)
    missing_blocks = max(0, needed_blocks - load.free_blocks)
    shortage_s = missing_blocks * load.block_size * step_s / max(load.num_sequences, 1)
    return prefill_s + decode_s + shortage_s


def share_rates(loads: Sequence[ReplicaLoad]) -> list[ReplicaLoad]:
    """Give replicas that have not measured a rate yet the mean of those that have.

    They serve one model, mostly on like machines. A default in its place would favour or shun the newcomers, who would
    then stay as they are.
    """
    prefill = _mean(load.prefill_tokens_per_s for load in loads)
    step_s = _mean(load.decode_step_s for load in loads)
    sequence_s = _mean(load.decode_sequence_s for load in loads)
    return [
        load._replace(
            prefill_tokens_per_s=load.prefill_tokens_per_s or prefill,
            decode_step_s=load.decode_step_s or step_s,
            decode_sequence_s=load.decode_sequence_s or sequence_s,
        )
        for load in loads
    ]


def _mean(rates: Iterable[float]) -> float:
    known = [rate for rate in rates if rate > 0]
    return sum(known) / len(known) if known else 0.0
