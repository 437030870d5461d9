"""The simulated fleet does what its prices say, and what it is told."""

from __future__ import annotations

import warnings

import pytest

from app.autoscaling.report import Observation
from app.autoscaling.sizing import SizingRules
from benchmarks.elastic.report import late_ttft_s
from benchmarks.elastic.simulation import ElasticOutcome, ElasticSimulation, Timing
from benchmarks.elastic.workload import SHAPE, ElasticRequest, Lengths, Prices, shaped_load

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from benchmarks.elastic.controllers import (
        FixedController,
        RayController,
        RayOptions,
        ScheduleController,
        SizerController,
    )
    from benchmarks.elastic.least import least_replica_s

PRICES = Prices(prefill_tokens_per_s=1000.0, step_s=0.02, step_tokens=100)
RULES = SizingRules(0, 4, downscale_delay_s=3.0, idle_to_zero_s=5.0, ttft_target_s=1.0, target_utilization=0.9)


def test_a_prompt_is_computed_in_chunks_and_its_tokens_follow_a_step_apart() -> None:
    outcome = ElasticSimulation(PRICES, FixedController(1), initial_replicas=1).run([ElasticRequest(1.0, 250, 5)], 3.0)
    # Chunks of 100, 100 and 50 tokens, the last of which takes longer than a step must.
    assert outcome.ttft_s == [pytest.approx(0.25)]
    outcome = ElasticSimulation(PRICES, FixedController(1), initial_replicas=1).run([ElasticRequest(1.0, 5, 5)], 3.0)
    assert outcome.ttft_s == [pytest.approx(0.02)]


def test_prompts_queue_on_one_replica_and_not_on_two() -> None:
    both = [ElasticRequest(1.0, 300, 1), ElasticRequest(1.0, 300, 1)]
    alone = ElasticSimulation(PRICES, FixedController(1), initial_replicas=1).run(both, 3.0)
    assert alone.ttft_s == [pytest.approx(0.3), pytest.approx(0.6)]
    spread = ElasticSimulation(PRICES, FixedController(2), initial_replicas=2).run(both, 3.0)
    assert spread.ttft_s == [pytest.approx(0.3), pytest.approx(0.3)]


def test_the_first_request_wakes_a_replica_whatever_the_policy_says() -> None:
    class Sleeper:
        def decide(self, seen: Observation) -> int:
            return seen.target

    outcome = ElasticSimulation(PRICES, Sleeper(), Timing(start_s=4.0)).run([ElasticRequest(1.0, 100, 1)], 3.0)
    assert outcome.ttft_s[0] == pytest.approx(4.1, abs=0.11)
    assert len(outcome.lives) == 1


def test_what_drains_finishes_and_counts_until_then() -> None:
    outcome = ElasticSimulation(PRICES, ScheduleController([1, 0], 2.0), Timing(0.0), 1).run(
        [ElasticRequest(1.9, 1000, 50)], 2.0
    )
    ((born, ready, gone),) = outcome.lives
    assert (born, ready) == (0.0, 0.0)
    assert gone == pytest.approx(1.9 + 1.0 + 49 * 0.02)
    assert outcome.replica_s == pytest.approx(gone)


def run_shape(rules: SizingRules | None = None, ray: RayOptions | None = None) -> list[ElasticOutcome]:
    outcomes = []
    for seed in range(4):
        controller = SizerController(RULES) if ray is None else RayController(ray, rules or RULES)
        requests = shaped_load(SHAPE, Prices(), Lengths(), seed)
        outcomes.append(ElasticSimulation(Prices(), controller, Timing(3.0)).run(requests, 100.0))
    return outcomes


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_sizing_keeps_the_target_through_the_ramp_with_less_than_rays_policy() -> None:
    ours = run_shape()
    assert mean([late_ttft_s(outcome.ttft_s) for outcome in ours]) < RULES.ttft_target_s
    assert all(max(len(outcome.lives), 4) >= 4 for outcome in ours)
    theirs = run_shape(ray=RayOptions(4.0))
    assert mean([outcome.replica_s for outcome in ours]) < 0.9 * mean([outcome.replica_s for outcome in theirs])
    assert mean([late_ttft_s(outcome.ttft_s) for outcome in ours]) < mean(
        [late_ttft_s(outcome.ttft_s) for outcome in theirs]
    )


def test_the_least_is_a_schedule_that_keeps_the_target_and_costs_less_than_all_the_time_all_of_them() -> None:
    requests = [ElasticRequest(second / 2, 300, 2) for second in range(40)]
    requests += [ElasticRequest(8.0 + number / 8, 300, 2) for number in range(32)]
    requests.sort()
    least = least_replica_s(requests, PRICES, 4, 1.0, start_s=2.0, period_s=4.0)
    schedule = ScheduleController(least.numbers, 4.0)
    outcome = ElasticSimulation(PRICES, schedule, Timing(0.0), least.numbers[0]).run(requests, requests[-1].due_s)
    assert late_ttft_s(outcome.ttft_s) <= 1.0
    assert least.replica_s == pytest.approx(outcome.replica_s + 2.0 * len(outcome.lives))
    work_s = sum(request.num_prompt for request in requests) / 1000.0
    assert work_s < least.replica_s < 4 * 20.0
    assert max(least.numbers) > least.numbers[0]


def test_a_target_that_cannot_be_kept_has_no_least() -> None:
    with pytest.raises(ValueError, match="2 replicas cannot keep"):
        least_replica_s([ElasticRequest(0.1, 5000, 1)], PRICES, 2, 1.0, 1.0)
