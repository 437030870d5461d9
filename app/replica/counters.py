"""Tells all ingresses what a replica counts, a second after it has changed at the latest."""

from __future__ import annotations

from collections.abc import Callable

from app.replica.stream_server import StreamServer
from app.transport.counter_messages import ReplicaCounters, encode_counters
from engine.outputs import EngineAccounts

# Prometheus reads every few seconds; a frame to each ingress in each of these costs a replica nothing that shows.
INTERVAL_S = 1.0


class CounterReporter:
    """Beside the load, which leaves hundreds of times a second: one timer, and a frame only for news.

    On the server's thread, once the server runs.

    Args:
        accounts: of the engine; another object once there are new ones.
    """

    def __init__(self, accounts: Callable[[], EngineAccounts], server: StreamServer) -> None:
        self._accounts = accounts
        self._server = server
        self._told: EngineAccounts | None = None
        self._closed = False

    def start(self) -> None:
        """Report from now on, until `close`."""
        if not self._closed:
            self._report()
            self._server.call_later(INTERVAL_S, self.start)

    def close(self) -> None:
        """The server is about to stop."""
        self._closed = True

    def subscribed(self, ingress_id: str) -> None:
        """An ingress has come, and is told at once."""
        self._server.send(ingress_id, encode_counters(replica_counters(self._accounts())))

    def _report(self) -> None:
        accounts = self._accounts()
        if accounts is self._told:
            return
        self._told = accounts
        frame = encode_counters(replica_counters(accounts))
        for ingress_id in self._server.subscribers:
            self._server.send(ingress_id, frame)


def replica_counters(accounts: EngineAccounts) -> ReplicaCounters:
    """An engine's accounts as they travel."""
    stats, memory = accounts
    adapters = stats.adapters
    block_size = memory.num_slots // stats.num_blocks
    # A contiguous pool's fragments are empty, and counted as fragmentation already.
    cached = max(0, memory.free - stats.num_empty_blocks * block_size)
    return ReplicaCounters(
        token_state_slots=memory.token_states,
        reserved_slots=memory.reserved,
        internal_fragmentation_slots=memory.internal_fragmentation,
        rounding_slots=memory.rounding,
        external_fragmentation_slots=memory.external_fragmentation,
        cached_slots=cached,
        empty_slots=memory.free - cached,
        swapped_slots=(stats.num_swap_blocks - stats.num_free_swap_blocks) * block_size,
        free_swap_slots=stats.num_free_swap_blocks * block_size,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_swapped=stats.num_swapped,
        num_swaps=stats.num_swaps,
        num_recomputations=stats.num_preemptions - stats.num_swaps,
        num_prompt_tokens=stats.num_prompt_tokens,
        num_cached_tokens=stats.num_cached_tokens,
        num_output_tokens=stats.num_output_tokens,
        num_steps=stats.num_steps,
        schedule_s=stats.schedule_s,
        execute_s=stats.execute_s,
        process_s=stats.process_s,
        num_adapters=len(adapters.resident),
        adapter_bytes=adapters.resident_bytes,
        num_adapter_loads=adapters.num_loads,
        num_adapter_evictions=adapters.num_evictions,
        adapter_load_s=adapters.load_s,
        num_adapter_load_failures=adapters.num_failures,
    )
