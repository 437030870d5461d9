"""How a replica tells ingresses what it counts: COUNTERS, for people and alerts; the balancer has LOAD.

Cumulative, so that a message that is lost or late costs nothing. A map by name, as LOAD is: a version can add what
another does not know, and an ingress of an older one takes the frame for a sign of life.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.transport.errors import FrameError
from app.transport.frames import Frame, encode_frame
from app.transport.messages import Kind


@dataclass(frozen=True, slots=True)
class ReplicaCounters:
    """A replica's numbers at one moment: first what is now, then what was since its engine started.

    Attributes:
        token_state_slots .. empty_slots: token slots of the KV pool, as MemoryUsage has them, its free ones split into
            those with cached content and empty ones. They add up to the pool.
        swapped_slots, free_swap_slots: token slots of the swap pool.
        num_waiting: requests, the `num_swapped` ones included.
        num_swaps, num_recomputations: preemptions.
        num_cached_tokens: of the prompt tokens, those found in the prefix cache.
        schedule_s, execute_s, process_s: seconds of all steps: choosing the batch, waiting for the device, taking its
            tokens over.
        num_adapters, adapter_bytes: LoRA adapters that are resident or being loaded, and what they take.
        adapter_load_s: seconds of all `num_adapter_loads`, beside the steps.
    """

    token_state_slots: int = 0
    reserved_slots: int = 0
    internal_fragmentation_slots: int = 0
    rounding_slots: int = 0
    external_fragmentation_slots: int = 0
    cached_slots: int = 0
    empty_slots: int = 0
    swapped_slots: int = 0
    free_swap_slots: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_swaps: int = 0
    num_recomputations: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    schedule_s: float = 0.0
    execute_s: float = 0.0
    process_s: float = 0.0
    num_adapters: int = 0
    adapter_bytes: int = 0
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0
    adapter_load_s: float = 0.0
    num_adapter_load_failures: int = 0


_FIELDS: dict[str, Callable[[Any], Any]] = {
    entry.name: type(entry.default) for entry in dataclasses.fields(ReplicaCounters)
}


def encode_counters(counters: ReplicaCounters) -> bytes:
    """The COUNTERS frame."""
    return encode_frame(Kind.COUNTERS, {name: getattr(counters, name) for name in _FIELDS})


def decode_counters(frame: Frame) -> ReplicaCounters:
    """Unknown names are ignored, missing ones take their default. Raises FrameError."""
    try:
        values = frame.fields[0]
        return ReplicaCounters(**{name: kind(values[name]) for name, kind in _FIELDS.items() if name in values})
    except (ValueError, TypeError, IndexError) as error:
        raise FrameError(f"malformed COUNTERS: {error}") from error
