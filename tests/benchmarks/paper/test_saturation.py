"""What overloaded systems serve, and what their steps cost under other hardware."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.paper.runs import Run, Workload, simulate
from benchmarks.paper.saturation import Overload, Saturation, saturate
from benchmarks.paper.setups import OPT_13B, ORCA_MAX
from benchmarks.paper.traces import ALPACA
from engine.execution.hardware import find_hardware

A100 = find_hardware("a100-40gb")


@pytest.fixture(scope="module")
def orca_max() -> Saturation:
    return saturate(Overload(OPT_13B, ORCA_MAX, Workload("Alpaca", ALPACA)))


def test_orca_max_batches_what_its_pool_holds_and_serves_what_its_steps_allow(orca_max: Saturation) -> None:
    assert orca_max.num_batched == pytest.approx(7.0, abs=0.05)  # 15.7K slots, 2,048 each
    rate = orca_max.rate(A100)
    assert rate == pytest.approx(7.0 / orca_max.step_s(A100) / 58.45, rel=0.05)
    # No trace is served faster in the long run; one that arrives slower is served as it arrives.
    slower = simulate(Run(OPT_13B, ORCA_MAX, Workload("Alpaca", ALPACA), 0.8 * rate, 120.0))
    faster = simulate(Run(OPT_13B, ORCA_MAX, Workload("Alpaca", ALPACA), 1.5 * rate, 120.0))
    assert slower.normalized_latency < 0.5 < faster.normalized_latency


def test_the_same_steps_are_priced_under_other_costs(orca_max: Saturation) -> None:
    dearer = dataclasses.replace(A100, step_s=A100.step_s + 0.1)
    assert orca_max.step_s(dearer) == pytest.approx(orca_max.step_s(A100) + 0.1)
    assert orca_max.rate(dearer) < orca_max.rate(A100)
    assert sum(orca_max.parts(dearer).values()) == pytest.approx(orca_max.step_s(dearer))
    assert orca_max.parts(dearer)["all-reduces' latency"] == pytest.approx(0.0, abs=1e-9)


def test_seven_sequences_wait_for_the_weights(orca_max: Saturation) -> None:
    assert orca_max.arithmetic_share(A100) < 0.1
    assert orca_max.arithmetic_share(dataclasses.replace(A100, matrix_flops=1e9)) == 1.0
