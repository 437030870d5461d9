"""The capacity formula: its limits are those that can be told by hand, and it agrees with itself both ways round."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest

from app.autoscaling.capacity import Pace, ReplicaLimits, Traffic, capacity, foresee, replicas_for
from engine.errors import ConfigError

PACE = Pace(prompt_tokens_per_s=5000.0, step_s=0.02, sequence_s=0.001)
LIMITS = ReplicaLimits(max_num_seqs=32, num_blocks=10_000)
TRAFFIC = Traffic(1.0, 500.0, 100.0)


def test_an_idle_replica_takes_two_steps_and_the_prompts_own_time() -> None:
    found = foresee(PACE, LIMITS, TRAFFIC._replace(requests_per_s=1e-6), 1)
    # The step that runs, which may compute a prompt as well, and its own.
    assert found.ttft_p95_s == pytest.approx(2 * 0.02 + 2 * 0.1, rel=0.01)
    assert found.tpot_s == pytest.approx(0.02, rel=0.001)


def test_little_s_law_and_the_time_that_prompts_take_from_decodes() -> None:
    found = foresee(PACE, LIMITS, TRAFFIC._replace(requests_per_s=3.0), 1)
    assert found.prompt_share == pytest.approx(3.0 * 0.1)
    assert found.tpot_s == pytest.approx((0.02 + 0.001 * found.running) / 0.7)
    assert found.running == pytest.approx(3.0 * 100 * found.tpot_s, rel=1e-4)
    assert found.seat_share == pytest.approx(found.running / 32)


def test_where_steps_overlap_short_prompts_are_free() -> None:
    pace = Pace(50_000.0, 0.02, overlaps=True)
    found = foresee(pace, LIMITS, TRAFFIC._replace(requests_per_s=5.0), 1)
    assert found.prompt_share == pytest.approx(0.0, abs=1e-3)
    assert found.tpot_s == pytest.approx(0.02, rel=1e-3)


def simulated(pace: Pace, traffic: Traffic, seconds: float) -> tuple[float, float]:
    """Seconds a token, and sequences that run, of a replica that computes steps without a bound."""
    draw = random.Random(0)
    now_s, due_s, num_steps, waiting, tokens = 0.0, 0.0, 0, 0, 0
    ends: deque[int] = deque()
    while now_s < seconds:
        now_s += pace.mixed_s(waiting * traffic.prompt_tokens, len(ends))
        num_steps += 1
        tokens += len(ends)
        while ends and ends[0] <= num_steps:
            ends.popleft()
        ends.extend([num_steps + int(traffic.output_tokens)] * waiting)
        waiting = 0
        while due_s < now_s:
            due_s += draw.expovariate(traffic.requests_per_s)
            waiting += 1
    return now_s / num_steps, tokens / num_steps


@pytest.mark.parametrize(("rate", "prompt_tokens"), [(7.5, 256.0), (10.5, 256.0), (12.0, 256.0), (60.0, 20.0)])
def test_where_steps_overlap_they_last_as_long_as_computed_step_by_step(rate: float, prompt_tokens: float) -> None:
    # As long as prompts hid behind a step each, however many came in one, 12 a second took 43 ms a token, not 55.
    pace, traffic = Pace(4000.0, 0.02, overlaps=True), Traffic(rate, prompt_tokens, 32.0)
    found = foresee(pace, ReplicaLimits(4096, 1 << 20), traffic, 1)
    tpot_s, running = simulated(pace, traffic, 1000.0)
    assert found.tpot_s == pytest.approx(tpot_s, rel=0.1)
    assert found.running == pytest.approx(running, rel=0.1)


def test_where_steps_overlap_decodes_are_computed_too() -> None:
    pace, limits = Pace(4000.0, 0.02, overlaps=True), ReplicaLimits(4096, 1 << 20)
    bound = 4000.0 / (256 + 32)
    assert foresee(pace, limits, Traffic(1.001 * bound, 256.0, 32.0), 1).ttft_p95_s == math.inf
    assert foresee(pace, limits, Traffic(0.95 * bound, 256.0, 32.0), 1).ttft_p95_s < math.inf


def test_prompts_alone_bound_the_rate() -> None:
    """With one output token and steps that cost next to nothing: the target is what M/M/1 says."""
    pace, traffic = Pace(1000.0, 1e-6), Traffic(1.0, 100.0, 1.0)
    limits = ReplicaLimits(4096, 1 << 20, max_num_batched_tokens=1 << 20)
    rate = capacity(pace, limits, traffic, 1, ttft_target_s=1.0)
    utilization = rate * 0.1
    waits_s = math.log(utilization / 0.05) * 0.1 / (1 - utilization)
    assert waits_s + 0.2 == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("limits", [LIMITS._replace(max_num_seqs=8), LIMITS._replace(num_blocks=8 * 35)])
def test_seats_and_blocks_bound_the_rate(limits: ReplicaLimits) -> None:
    assert limits.seats(TRAFFIC) == 8
    rate = capacity(PACE, limits, TRAFFIC, 1, ttft_target_s=60.0)
    found = foresee(PACE, limits, TRAFFIC._replace(requests_per_s=rate), 1)
    assert 7.0 < found.running < 8.0
    assert rate < capacity(PACE, LIMITS, TRAFFIC, 1, ttft_target_s=60.0)


def test_what_a_cache_has_is_not_computed_but_held() -> None:
    cached = TRAFFIC._replace(prompt_tokens=50.0, held_prompt_tokens=500.0)
    assert LIMITS.seats(cached) == LIMITS.seats(TRAFFIC)
    assert capacity(PACE, LIMITS, cached, 1, 1.0) > capacity(PACE, LIMITS, TRAFFIC, 1, 1.0)


def test_replicas_for_a_rate_bear_it_and_one_fewer_does_not() -> None:
    for rate in (1.0, 7.0, 40.0, 300.0):
        number = replicas_for(PACE, LIMITS, TRAFFIC._replace(requests_per_s=rate), 1.0, max_seat_share=1.0)
        assert capacity(PACE, LIMITS, TRAFFIC, number, 1.0) >= rate
        assert number == 1 or capacity(PACE, LIMITS, TRAFFIC, number - 1, 1.0) < rate


def test_many_replicas_together_bear_more_than_each_alone() -> None:
    assert capacity(PACE, LIMITS, TRAFFIC, 8, 0.5) > 8 * capacity(PACE, LIMITS, TRAFFIC, 1, 0.5)


def test_a_fuller_pool_needs_fewer_replicas() -> None:
    traffic = TRAFFIC._replace(requests_per_s=40.0)
    assert replicas_for(PACE, LIMITS, traffic, 1.0, 0.3) > replicas_for(PACE, LIMITS, traffic, 1.0, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pace": PACE._replace(step_s=0.0)}, "step_s above 0"),
        ({"traffic": TRAFFIC._replace(requests_per_s=0.0)}, "requests_per_s and prompt_tokens above 0"),
        (
            {"traffic": TRAFFIC._replace(prompt_variation=-1.0)},
            "have prompt_variation and output_variation of 0",
        ),
        ({"limits": LIMITS._replace(num_blocks=3)}, "num_blocks=3 of 16 tokens do not hold one such request"),
        ({"traffic": TRAFFIC._replace(prompt_tokens=10_000.0)}, r"ttft_target_s=1 cannot be kept: .* takes 4"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    given = {"pace": PACE, "limits": LIMITS, "traffic": TRAFFIC, **change}
    with pytest.raises(ConfigError, match=message):
        replicas_for(**given, ttft_target_s=1.0)  # type: ignore[arg-type]
