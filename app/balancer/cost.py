"""What a request would cost on a replica, in seconds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

# What replicas are taken to do until one of them has measured itself: a small model on a few cores.
DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_DECODE_STEP_S = 0.02
DEFAULT_DECODE_SEQUENCE_S = 0.001
DEFAULT_ADAPTER_LOAD_S = 0.1


class RequestCost(NamedTuple):
    """What the balancer knows of a request.

    Attributes:
        prompt_tokens: to be computed, those that a resumed request had already produced included.
        output_tokens: expected of each of its `num_sequences`; `max_tokens` is the bound, not the expectation.
        block_hashes: the chain of its prompt's full blocks of `block_size` tokens, as the engine hashes them.
        adapter: that it is for; "" is the base.
    """

    prompt_tokens: int
    output_tokens: int
    num_sequences: int = 1
    block_hashes: Sequence[Hashable] = ()
    block_size: int = 16
    adapter: str = ""

    def uncached_tokens(self, num_cached_blocks: int) -> int:
        """Prompt tokens left to compute where so many blocks are cached; at least one always is."""
        return max(self.prompt_tokens - num_cached_blocks * self.block_size, 1)


class ReplicaLoad(NamedTuple):
    """What a replica is known to have to do, bookings that it cannot have reported yet included.

    Attributes:
        wait_s: until the prompts queued there are computed.
        silence_s: how long it has not been heard from, if that is so long that it may be gone, else 0.
        num_sequences: sequences that decode there, or will.
        free_blocks: blocks that can be handed out, of which `empty_blocks` hold nothing worth keeping.
        cache_age_s: how long the content that goes next has not been used; 0 while unknown.
        prefill_tokens_per_s, decode_step_s, decode_sequence_s, adapter_load_s: measured rates, as in LoadReport.
        num_free_adapter_slots: as in LoadReport.
        lacks_adapter: whether the request's adapter is neither there nor on its way.
    """

    wait_s: float
    num_sequences: int
    free_blocks: int
    empty_blocks: int
    cache_age_s: float
    block_size: int
    prefill_tokens_per_s: float
    decode_step_s: float
    decode_sequence_s: float
    silence_s: float = 0.0
    adapter_load_s: float = 0.0
    num_free_adapter_slots: int = 0
    lacks_adapter: bool = False


class CostWeights(NamedTuple):
    """What the cost cannot measure.

    Attributes:
        crowding: seconds that later requests lose to each second of prompt computed now. Work that a cached prefix
            saves is saved for everyone who comes after, too.
        reuse: probability that a block evicted at once would be asked for again; it falls by half every
            `reuse_half_life_s` that the block has lain unused.
    """

    crowding: float = 0.4
    reuse: float = 0.3
    reuse_half_life_s: float = 140.0


def cost_s(request: RequestCost, load: ReplicaLoad, num_cached_blocks: int, weights: CostWeights) -> float:
    """Seconds that this choice adds, to the request itself and to others.

    - the wait for prompts queued before it;
    - its own prompt, less what is cached, and what that work takes from those who come later;
    - decoding: each sequence makes every step `decode_sequence_s` longer. The request's sequences lose that time to
      everyone who runs there, and everyone loses it to them, for as long as the request decodes;
    - eviction: blocks that its prompt pushes out of the cache, as far as they would have been used again;
    - silence: whoever has been silent for some time may be so for as long again;
    - shortage: blocks that must first be freed by sequences that end, one block per `block_size` steps of each;
    - its adapter, where that has to be loaded: see adapter_s.
    """
    prefill_s = request.uncached_tokens(num_cached_blocks) / load.prefill_tokens_per_s
    cost = load.wait_s + load.silence_s + prefill_s * (1.0 + weights.crowding)
    if load.num_sequences:
        cost += 2 * request.output_tokens * request.num_sequences * load.num_sequences * load.decode_sequence_s
    new_blocks = -(-request.prompt_tokens // load.block_size) - num_cached_blocks
    evicted = min(new_blocks, load.free_blocks) - load.empty_blocks
    if evicted > 0 and weights.reuse:
        reuse = weights.reuse * math.exp2(-load.cache_age_s / weights.reuse_half_life_s)
        cost += evicted * reuse * load.block_size / load.prefill_tokens_per_s
    if new_blocks > load.free_blocks:
        missing = new_blocks - load.free_blocks
        cost += missing * load.block_size * load.decode_step_s / max(load.num_sequences, 1)
    return cost + adapter_s(request, load)


def adapter_s(request: RequestCost, load: ReplicaLoad) -> float:
    """Seconds until the request's adapter can be used: its load, and before it, if those in use leave no slot, about
    what a request takes to decode."""
    if not load.lacks_adapter:
        return 0.0
    wait_s = 0.0 if load.num_free_adapter_slots else request.output_tokens * load.decode_step_s
    return load.adapter_load_s + wait_s
