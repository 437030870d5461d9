"""What a replica exports for autoscaling, and what its policy makes of all exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class ReplicaReport(NamedTuple):
    """One replica's numbers at one moment, as Serve's `record_autoscaling_stats` takes them: by name, numbers only.

    Attributes:
        offered_requests, offered_prompt_tokens, offered_prompt_squares, offered_output_tokens: its share of what
            ingresses were asked for since it started: prompt tokens not expected in the cache, their squares request
            by request, expected output; refused requests count.
        queued_s: its share of the seconds of one replica's work that wait in ingresses.
        demand_shares: sum of the ingresses' shares, each 1 over the replicas that it has told.
        num_ingresses: those that have told.
        num_waiting, num_waiting_tokens: requests, and prompt tokens that it has yet to compute.
        num_running: requests; their sequences are at most `max_num_seqs`.
        num_output_tokens: drawn since it started.
        kv_use: KV blocks that requests hold, over those of the pool.
        prompt_tokens_per_s: measured, decoding beside them included; 0 until known.
    """

    offered_requests: float = 0.0
    offered_prompt_tokens: float = 0.0
    offered_prompt_squares: float = 0.0
    offered_output_tokens: float = 0.0
    queued_s: float = 0.0
    demand_shares: float = 0.0
    num_ingresses: float = 0
    num_waiting: float = 0
    num_waiting_tokens: float = 0
    num_running: float = 0
    num_output_tokens: float = 0
    kv_use: float = 0.0
    prompt_tokens_per_s: float = 0.0
    max_num_seqs: float = 1

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> ReplicaReport:
        """From what Serve has collected; names of another version are left out, missing ones take their default."""
        return cls(**{name: numbers[name] for name in cls._fields if name in numbers})


class Observation(NamedTuple):
    """What a decision is made from.

    Attributes:
        now_s: of any clock that only goes forward.
        target: replicas that were asked for last; those beyond `num_running` are starting.
        num_running: replicas that are ready.
        reports: the latest of each running replica, by its id; missing until it has sent one.
        open_requests: as Serve counts them, those queued before its router included.
        failed_starts: of replicas, ever.
    """

    now_s: float
    target: int
    num_running: int
    reports: Mapping[str, ReplicaReport]
    open_requests: float
    failed_starts: int = 0
