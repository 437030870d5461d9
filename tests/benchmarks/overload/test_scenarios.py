"""The claims, on the simulated fleet: the same code that the benchmark runs, for seconds of its time."""

from __future__ import annotations

import json

import pytest

from benchmarks.overload.__main__ import main
from benchmarks.overload.scenarios import Shape, capacity, coming_of, flood, overload, simulate
from benchmarks.overload.workload import Lengths

SHAPE = Shape(4, 2, 1500.0, 0.04, 32, 60, 2.0, Lengths((64, 512), (16, 64)), 600.0)
CAPACITY = 17.8


def test_the_capacity_is_what_the_fleet_can_compute() -> None:
    assert capacity(SHAPE, 0) == pytest.approx(CAPACITY, rel=0.1)


@pytest.mark.parametrize("num_ingresses", [1, 2])
def test_the_admitted_are_in_time_and_what_the_refused_were_told_holds(num_ingresses: int) -> None:
    shape = SHAPE._replace(num_ingresses=num_ingresses)
    scenario = overload(4.0, 0.5, 15.0)
    found = simulate(scenario, shape, coming_of(scenario, shape, CAPACITY, 0), 0)
    during, after = found["overload"], found["after"]
    assert during["ttft_p95_s"] <= shape.ttft_s
    assert during["refused"] > during["first_tries"] / 2
    assert during["admitted"] > 15.0 * CAPACITY
    assert found["told"]["retries"] > 500
    assert found["told"]["admitted_share"] >= 0.95
    assert after["refused"] <= 0.05 * after["first_tries"]
    assert after["ttft_p95_s"] <= shape.ttft_s


def test_a_flood_slows_a_calm_tenant_little() -> None:
    scenario = flood(4.0, 0.8, 30.0)
    found = simulate(scenario, SHAPE, coming_of(scenario, SHAPE, CAPACITY, 2), 2)
    assert found["slowdown"]["to_a_fair_one"] <= 1.2
    assert found["beside a flood"]["calm"]["refused"] == 0
    assert found["beside a flood"]["flooding"]["refused"] > 0


def test_requests_of_a_calm_tenant_that_come_in_a_cluster_are_not_refused_for_a_flood() -> None:
    # Seven of them come to one ingress within 1.5 s here; two mean requests of credit had five of 34 refused.
    shape = SHAPE._replace(prefill_tokens_per_s=600.0, step_tokens=24, ttft_s=3.0)
    scenario = flood(4.0, 0.8, 22.0)
    found = simulate(scenario, shape, coming_of(scenario, shape, 6.85, 0), 0)
    assert found["beside a flood"]["calm"]["refused"] == 0
    assert found["slowdown"]["to_a_fair_one"] <= 1.2


@pytest.mark.slow
@pytest.mark.ray
def test_overload_on_a_real_application(capsys: pytest.CaptureFixture[str]) -> None:
    # Few and slow requests: the machine is to simulate the fleet, not to be overloaded by its clients.
    shape = ["--replicas", "2", "--prefill-rate", "300", "--step-ms", "60", "--seats", "16", "--ttft-s", "4"]
    main([*shape, "--scenario", "overload", "--seconds", "12", "--patience", "20"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["overload"]["real"]
    assert found["overload"]["refused"] > 0
    assert found["overload"]["admitted"] > 0
    assert found["told"]["admitted_share"] >= 0.5
    # Who is in time is the benchmark's to say: it depends on what else this machine does.
    assert found["overload"]["in_time_share"] > 0.0
    assert sum(found[phase]["errors"] for phase in ("before", "overload", "after")) == 0
