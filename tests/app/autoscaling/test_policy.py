"""The policy as Serve's controller has it: pickled by value, called with Serve's context, answers with a number."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray.experimental.internal_kv as internal_kv
    from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
    from ray.serve.config import AutoscalingContext

    from app.autoscaling.policy import ReplicaSizingPolicy, observation
    from app.autoscaling.serve_options import autoscaling_config
    from app.config import ScalingArgs

from app.autoscaling.report import ReplicaReport
from tests.app.autoscaling.test_decision_counts import ControlStore

DEPLOYMENT = DeploymentID("engine-m", "app")
ARGS = ScalingArgs(min_replicas=0, max_replicas=4, idle_to_zero_s=30.0, upscale_delay_s=0.0, downscale_delay_s=5.0)


class Clock:
    """A policy's, which its calls are given one by one."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def context(now_s: float, target: int, *reports: ReplicaReport, requests: float = 0.0) -> AutoscalingContext:
    ids = [ReplicaID(f"r{number}", DEPLOYMENT) for number in range(len(reports))]
    raw = {
        name: {
            replica_id: [TimeStampedValue(now_s - 1.0, -1.0), TimeStampedValue(now_s, report._asdict()[name])]
            for replica_id, report in zip(ids, reports, strict=True)
        }
        for name in ReplicaReport._fields
    }
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="engine-m",
        app_name="app",
        current_num_replicas=len(reports),
        target_num_replicas=target,
        running_replicas=ids,
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        # The time of day, which no delay may go by.
        current_time=1e9 - now_s,
        config=None,
    )


def report(requests: float, waiting_tokens: float = 0.0) -> ReplicaReport:
    return ReplicaReport(
        requests,
        requests * 500,
        requests * 500**2,
        num_waiting_tokens=waiting_tokens,
        prompt_tokens_per_s=10_000.0,
        max_num_seqs=64,
    )


class PolicyAsServeHasIt:
    """Called at times that the test says."""

    def __init__(self) -> None:
        config = autoscaling_config(ARGS).policy
        self._clock = Clock()
        made = config.get_policy()(clock=self._clock, **config.policy_kwargs)
        assert isinstance(made, ReplicaSizingPolicy)
        self._policy = made

    def __call__(self, now_s: float, target: int, *reports: ReplicaReport) -> tuple[int, dict[str, Any]]:
        self._clock.now_s = now_s
        return self._policy(context(now_s, target, *reports))


def test_the_latest_exports_of_each_replica_are_seen() -> None:
    seen = observation(context(7.0, 3, report(1.0), report(2.0, 30.0), requests=1.5), 7.0)
    assert seen.reports == {"r0": report(1.0), "r1": report(2.0, 30.0)}
    assert (seen.now_s, seen.target, seen.num_running, seen.open_requests) == (7.0, 3, 2, 1.5)


def test_serve_gets_a_number_and_the_log_one_line_a_decision(caplog: pytest.LogCaptureFixture) -> None:
    policy = PolicyAsServeHasIt()
    # Serve's logger does not propagate once Serve has set it up.
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "ray.serve"):
            for tick in range(20):
                assert policy(100.0 + tick / 10, 1, report(tick)) == (1, {})
            for tick in range(20, 24):
                number, _ = policy(100.0 + tick / 10, 1, report(tick, 1e6))
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert number == 4
    lines = [record.getMessage() for record in caplog.records if "Scaling" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("Scaling engine-m of app up, 1 -> 4 replicas, for queue: prompts ask for")


def test_an_idle_model_is_let_go_and_its_first_replica_is_left_to_serve() -> None:
    policy = PolicyAsServeHasIt()
    numbers = [policy(100.0 + second, 1, report(3.0))[0] for second in range(40)]
    assert (numbers[0], numbers[29], numbers[-1]) == (1, 1, 0)
    assert policy(150.0, 0)[0] == 0


def test_failed_starts_are_looked_up_while_no_replica_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    class Store(ControlStore):
        def internal_kv_get(self, key: bytes, namespace: bytes) -> bytes | None:
            nonlocal asked
            if key.startswith(b"start_failures"):
                asked += 1
                return b'[%d, "why"]' % asked
            return super().internal_kv_get(key, namespace)

    monkeypatch.setattr(internal_kv, "global_gcs_client", Store())
    policy = PolicyAsServeHasIt()
    policy(100.0, 0)
    for tick in range(20):
        policy(100.5 + tick / 10, 1, report(1.0))
    assert asked == 1
    numbers = [policy(103.0 + tick / 10, 1)[0] for tick in range(70)]
    assert asked == 8, "once a second"
    assert (numbers[0], numbers[-1]) == (1, 0)
