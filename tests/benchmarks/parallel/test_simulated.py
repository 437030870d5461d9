"""More devices compute faster and talk more; what does not fit is left out."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.parallel.simulated import MODELS, simulate


@pytest.mark.parametrize("model", MODELS)
def test_parts_add_up_and_go_the_right_way(model: str) -> None:
    steps = simulate(model, 32, 1024)
    assert [step.ranks for step in steps][-1] == 8
    for step in steps:
        assert step.compute_s + step.communication_s + step.host_s == pytest.approx(step.seconds)
    for fewer, more in itertools.pairwise(steps):
        assert more.compute_s == pytest.approx(fewer.compute_s * fewer.ranks / more.ranks)
        assert more.sent_bytes > fewer.sent_bytes


def test_a_model_too_large_for_the_device_is_left_out() -> None:
    assert [step.ranks for step in simulate("dummy:opt-175b", 32, 1024)] == [4, 8]


def test_one_device_sends_nothing() -> None:
    step = simulate("dummy:llama-3-8b", 32, 1024)[0]
    assert (step.ranks, step.sent_bytes, step.communication_s) == (1, 0.0, 0.0)
