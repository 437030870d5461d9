from __future__ import annotations

import random

import pytest

from app.balancer.admission_settings import AdmissionSettings, ClassSettings
from app.balancer.replica_queue import ReplicaQueue


def settings(deadline_s: float, queue_s: float = 1.0) -> AdmissionSettings:
    return AdmissionSettings(
        {"default": ClassSettings(0, deadline_s), "slow": ClassSettings(1, 600.0)}, replica_queue_s=queue_s
    )


@pytest.mark.parametrize(("deadline_s", "seconds"), [(0.1, 0.02), (3.0, 0.06), (50.0, 1.0), (600.0, 1.0)])
def test_it_is_a_part_of_the_shortest_deadline_within_bounds(deadline_s: float, seconds: float) -> None:
    assert ReplicaQueue(settings(deadline_s), random.Random(0)).seconds == pytest.approx(seconds)


def test_settings_change() -> None:
    queue = ReplicaQueue(settings(3.0), random.Random(0))
    queue.reconfigure(settings(3.0, queue_s=0.01))
    assert queue.seconds == 0.01


def test_only_ingresses_that_compete_draw() -> None:
    queue = ReplicaQueue(settings(5.0), random.Random(0))
    queue.sent()
    assert queue.longest_s(is_due=False) == pytest.approx(0.1)
    queue.compete()
    drawn = set()
    for _ in range(20):
        queue.sent()
        drawn.add(queue.longest_s(is_due=False))
    assert 0.06 <= min(drawn) < 0.08 < 0.1 < max(drawn) <= 0.12


def test_who_is_due_finds_more_than_any_draw_allows_others() -> None:
    queue = ReplicaQueue(settings(5.0), random.Random(0))
    queue.compete()
    for _ in range(20):
        queue.sent()
        assert queue.longest_s(is_due=True) > 2 * queue.longest_s(is_due=False)
