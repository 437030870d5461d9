"""What Serve's controller says of the models' replicas: asked seldom, missing when it does not answer."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from app.autoscaling.decision_counts import DecisionCounts
from app.ingress import scaling_state
from app.ingress.scaling_state import INTERVAL_S, DeploymentName, ScalingState

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Controller:
    """In place of Serve's."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.num_asked = 0
        self.failure: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.target = 3

    def details(self) -> dict[str, Any]:
        self.num_asked += 1
        self.answers.wait(10.0)
        if self.failure is not None:
            raise self.failure
        replicas = [{"state": state} for state in ("RUNNING", "RUNNING", "PENDING_MIGRATION")]
        engine = {"target_num_replicas": self.target, "replicas": replicas}
        return {"applications": {"quire": {"deployments": {"engine-m": engine}}}}

    def decisions(self, application: str, deployment: str) -> DecisionCounts:
        assert (application, deployment) == ("quire", "engine-m")
        return {("up", "kv"): 2}

    def asked(self) -> ScalingState:
        names = {"m": DeploymentName("quire", "engine-m"), "later": DeploymentName("other", "engine-later")}
        return ScalingState(lambda: names, self.details, self.decisions, lambda: self.now_s)


async def test_models_that_serve_knows_are_told_by_state() -> None:
    told = await Controller().asked().read()
    assert told.keys() == {"m"}, "an application that is not deployed yet is missing"
    assert told["m"].target == 3
    assert told["m"].states == {"starting": 0, "running": 2, "stopping": 0, "pending_migration": 1}
    assert told["m"].decisions == {("up", "kv"): 2}


async def test_the_controller_is_asked_seldom_however_many_scrape() -> None:
    controller = Controller()
    state = controller.asked()
    for _ in range(5):
        assert (await state.read())["m"].target == 3
    controller.now_s += INTERVAL_S - 0.1
    await state.read()
    assert controller.num_asked == 1
    controller.now_s += 0.1
    controller.target = 4
    assert (await state.read())["m"].target == 4
    assert controller.num_asked == 2


async def test_a_controller_that_fails_or_hangs_leaves_the_rest_of_the_metrics_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller()
    controller.failure = RuntimeError("no controller")
    state = controller.asked()
    assert await state.read() == {}
    controller.failure = None
    controller.now_s += INTERVAL_S
    controller.answers.clear()
    monkeypatch.setattr(scaling_state, "_TIMEOUT_S", 0.01)
    assert await state.read() == {}
    controller.now_s += INTERVAL_S
    assert await state.read() == {}
    assert controller.num_asked == 2, "one that hangs is asked once"
    controller.answers.set()
    monkeypatch.setattr(scaling_state, "_TIMEOUT_S", 10.0)
    assert (await state.read())["m"].target == 3
