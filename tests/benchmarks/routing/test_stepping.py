"""Replicas that compute in steps, on hardware whose times are easily reckoned."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest

from app.balancer import make_policy
from benchmarks.routing.replica import Progress
from benchmarks.routing.report import quantile, summary
from benchmarks.routing.simulation import FleetSetup, Simulation
from benchmarks.routing.stepping import SteppingModel
from benchmarks.routing.trace import Arrival, TracedRequest, arrivals
from engine.execution.hardware import HARDWARE
from engine.execution.simulated_build import fixed_price_hardware
from engine.execution.simulated_device import FixedPrices
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.loading import open_checkpoint
from tests.benchmarks.routing.test_simulation import conversations

SHAPE = open_checkpoint("dummy:llama-3.1-8b").model_config()
# Steps of 10 ms, or 1 ms for each prompt token that takes longer.
PRICED = StepTimeModel(SHAPE, fixed_price_hardware(SHAPE, FixedPrices(1000.0, 0.01)), 16)
H200 = StepTimeModel(SHAPE, HARDWARE["h200"], 16)


class Events:
    """Time, and what happens in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, event))

    def run(self, until: float = float("inf")) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()


class Watched:
    """When a request's tokens came."""

    def __init__(self, events: Events) -> None:
        self.first_at = self.last_at = self.tpot_s = -1.0
        self._events = events
        self.progress = Progress(self._first, self._last)

    def _first(self) -> None:
        self.first_at = self._events.now

    def _last(self, tpot_s: float) -> None:
        self.last_at, self.tpot_s = self._events.now, tpot_s


def request(num_prompt: int, num_output: int, first_block: int = 0) -> Arrival:
    blocks = tuple(range(first_block, first_block + -(-num_prompt // 512)))
    return Arrival(0.0, TracedRequest(0.0, num_prompt, num_output, blocks), 0)


def test_a_prompt_takes_steps_of_the_budget_and_tokens_a_step_each() -> None:
    events = Events()
    replica = SteppingModel(100, PRICED, max_num_batched_tokens=400).make_replica(events.at)
    seen = Watched(events)
    assert replica.admit(request(1000, 11), 0.0, seen.progress).cached_tokens == 0
    assert replica.load(0.0, ()).num_waiting_tokens == 1000
    events.run(until=0.5)
    assert replica.load(0.5, ()).num_waiting_tokens == 600
    events.run()
    # The head's product, of the one row that samples, adds 7 % of a prompt token to the last of three steps.
    assert seen.first_at == pytest.approx(1.0, abs=1e-4)
    assert seen.last_at - seen.first_at == pytest.approx(10 * 0.01, rel=1e-6)
    assert seen.tpot_s == pytest.approx(0.01, rel=1e-6)
    load = replica.load(events.now, ())
    assert (load.num_waiting, load.num_running, load.num_waiting_tokens, load.num_running_tokens) == (0, 0, 0, 0)
    assert replica.busy_s == pytest.approx(seen.last_at)


def test_a_prompt_beside_them_slows_the_tokens_of_others_and_cached_blocks_save_their_time() -> None:
    events = Events()
    replica = SteppingModel(100, PRICED, max_num_batched_tokens=401).make_replica(events.at)
    talker, reader, again = (Watched(events) for _ in range(3))
    replica.admit(request(400, 101), 0.0, talker.progress)
    events.run(until=0.5)
    replica.admit(request(1024, 1, first_block=50), events.now, reader.progress)
    events.run()
    assert reader.first_at == reader.last_at
    # 97 steps of 10 ms and three that are full of prompt: 400, 400 and 224 ms.
    assert talker.last_at - talker.first_at == pytest.approx(0.97 + 1.024, rel=0.02)
    assert talker.tpot_s == pytest.approx((0.97 + 1.024) / 100, rel=0.02)
    began = events.now
    assert replica.admit(request(1024, 1, first_block=50), began, again.progress).cached_tokens == 1023
    events.run()
    assert again.first_at - began == pytest.approx(0.01, rel=0.2)


def test_no_more_sequences_run_than_may() -> None:
    events = Events()
    replica = SteppingModel(100, PRICED, max_num_seqs=2).make_replica(events.at)
    seen = [Watched(events) for _ in range(3)]
    for number, watched in enumerate(seen):
        replica.admit(request(100, 50, first_block=10 * number), 0.0, watched.progress)
    events.run()
    assert seen[2].first_at > min(seen[0].last_at, seen[1].last_at)


def test_decoding_slows_with_the_batch_and_the_context_as_the_step_time_model_says() -> None:
    def pace(num_seqs: int, num_prompt: int) -> float:
        events = Events()
        replica = SteppingModel(9000, H200, max_num_batched_tokens=1 << 20).make_replica(events.at)
        seen = [Watched(events) for _ in range(num_seqs)]
        for number, watched in enumerate(seen):
            replica.admit(request(num_prompt, 101, first_block=1000 * number), 0.0, watched.progress)
        events.run()
        return seen[-1].tpot_s

    assert pace(32, 8000) > 1.5 * pace(1, 8000)
    assert pace(16, 32_000) > 1.5 * pace(16, 2000)
    contexts = 8000 + 50
    one = H200.seconds(StepWork(1, 1, 1, contexts, contexts))
    assert pace(1, 8000) == pytest.approx(one, rel=0.01)


def test_a_fleet_of_them_serves_everyone_and_its_pace_varies() -> None:
    trace = conversations(300, seed=3)
    setup = FleetSetup(4, SteppingModel(200, H200), hold_s=0.0)
    outcome = Simulation(setup, lambda: make_policy("cheapest")).run(arrivals(trace, 3000.0, seed=2))
    assert len(outcome.ttft_s) == len(outcome.tpot_s) == 300
    assert outcome.misjudged_requests == 0
    paces = sorted(outcome.tpot_s)
    assert quantile(paces, 0.99) > 1.2 * quantile(paces, 0.2) > 0.0
    assert summary(outcome)["goodput_rps"] > 0.0
