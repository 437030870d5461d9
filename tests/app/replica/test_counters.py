"""A replica's counters: the KV kinds of a real engine add up to its pool, and news alone is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from app.replica.counters import INTERVAL_S, CounterReporter, replica_counters
from app.transport.counter_messages import ReplicaCounters, decode_counters
from app.transport.frames import FrameDecoder
from engine.adapters import AdapterStats
from engine.async_engine import AsyncLLMEngine
from engine.config import EngineConfig
from engine.memory import MemoryUsage
from engine.outputs import EngineAccounts, EngineStats
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

STATS = EngineStats(10, 4, 3, 2, 0, 0, 9, 7, 100, 40, 60, 1, 3, 5, 1, 4)


def test_a_pools_kinds_and_preemptions_are_split() -> None:
    counters = replica_counters(EngineAccounts(STATS, MemoryUsage(80, 10, 6, 0, 0, 64, 6, 6)))
    assert (counters.cached_slots, counters.empty_slots) == (48, 16)
    assert (counters.swapped_slots, counters.free_swap_slots) == (16, 48)
    assert (counters.num_swaps, counters.num_recomputations) == (5, 4)


def test_adapters_are_told() -> None:
    stats = replace(STATS, adapters=AdapterStats(6, 4, ("sql", "chat"), 4096, 0, 1.5, 2))
    counters = replica_counters(EngineAccounts(stats, MemoryUsage(80, 10, 6, 0, 0, 64, 6, 6)))
    assert (counters.num_adapters, counters.adapter_bytes, counters.adapter_load_s) == (2, 4096, 1.5)
    assert (counters.num_adapter_loads, counters.num_adapter_evictions) == (6, 4)
    assert counters.num_adapter_load_failures == 2


def test_a_real_engines_kinds_add_up_and_its_time_is_split() -> None:
    config = EngineConfig.from_dict({"num_threads": 1, "num_blocks": 64, "dtype": "float32"})
    engine = AsyncLLMEngine.from_options("dummy:tiny", config)
    engine.start(lambda _: None)
    try:
        params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1)
        engine.add_request(EngineRequest("one", list(range(1, 40)), params))
        deadline = time.monotonic() + 30
        while engine.accounts().stats.num_output_tokens < 20:
            counters = replica_counters(engine.accounts())
            assert slots_of(counters) == 64 * 16
            assert time.monotonic() < deadline
            time.sleep(0.001)
        counters = replica_counters(engine.accounts())
    finally:
        engine.shutdown()
    # At rest the accounts are those of the end, not of a second before it.
    assert (counters.num_running, counters.token_state_slots, counters.num_output_tokens) == (0, 0, 20)
    assert counters.cached_slots > 0
    assert slots_of(counters) == 64 * 16
    assert min(counters.schedule_s, counters.execute_s, counters.process_s) > 0
    assert counters.execute_s > counters.schedule_s


def slots_of(counters: ReplicaCounters) -> int:
    return (
        counters.token_state_slots
        + counters.reserved_slots
        + counters.internal_fragmentation_slots
        + counters.rounding_slots
        + counters.external_fragmentation_slots
        + counters.cached_slots
        + counters.empty_slots
    )


class Server:
    """Keeps what is written, and the timer that was set."""

    subscribers = ("left", "right")

    def __init__(self) -> None:
        self.writes: list[tuple[str, ReplicaCounters]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def send(self, ingress_id: str, data: bytes) -> None:
        (frame,) = FrameDecoder().feed(data)
        self.writes.append((ingress_id, decode_counters(frame)))

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.timers.append((delay_s, callback))


def test_news_alone_is_told_and_a_newcomer_at_once() -> None:
    accounts = EngineAccounts(STATS, MemoryUsage(0, 0, 0, 0, 0, 160, 0, 0))
    server: Any = Server()
    reporter = CounterReporter(lambda: accounts, server)
    reporter.start()
    assert [name for name, _ in server.writes] == ["left", "right"]
    ((delay_s, again),) = server.timers
    assert delay_s == INTERVAL_S
    again()
    assert len(server.writes) == 2, "nothing has happened"
    accounts = EngineAccounts(replace(STATS, num_steps=8), accounts.memory)
    again()
    assert [counters.num_steps for _, counters in server.writes] == [7, 7, 8, 8]
    reporter.subscribed("left")
    assert server.writes[-1][1].num_steps == 8
    reporter.close()
    count = len(server.timers)
    again()
    assert len(server.timers) == count, "nothing runs after the end"
