from __future__ import annotations

import math
import warnings

import pytest

from app.config import IngressUserConfig
from benchmarks.elastic.server import elastic_config, read_log
from benchmarks.elastic.workload import Prices

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

LOG = """\
INFO 2026-11-23 10:44:18,136 controller 1 -- Adding 2 replicas to Deployment(name='engine-simulated', app='elastic').
INFO 2026-11-23 10:44:18,136 controller 1 -- Starting Replica(id='jvckxllk', deployment='engine-simulated', app='e').
INFO 2026-11-23 10:44:18,200 controller 1 -- Starting Replica(id='other', deployment='Ingress', app='elastic').
INFO 2026-11-23 10:44:19,136 controller 1 -- Starting Replica(id='b2', deployment='engine-simulated', app='e').
INFO 2026-11-23 10:44:20,636 controller 1 -- Replica(id='jvckxllk', deployment='engine-simulated', app='e') started \
successfully on node '3a' after 2.7s (PID: 1). Replica constructor took 0.8s.
INFO 2026-11-23 10:44:21,000 controller 1 -- Scaling engine-simulated of elastic up, 1 -> 2 replicas, for prompts: x
Traceback (most recent call last):
INFO 2026-11-23 10:44:23,136 controller 1 -- Replica(id='jvckxllk', deployment='engine-simulated', app='e') is stopped.
"""


def test_replicas_lives_and_decisions_are_read_off_the_controllers_log() -> None:
    log = read_log(LOG.splitlines(), "engine-simulated")
    first, second = log.lives
    assert first.ready_s - first.asked_s == pytest.approx(2.5)
    assert first.gone_s - first.asked_s == pytest.approx(5.0)
    assert (second.ready_s, second.gone_s) == (math.inf, math.inf)
    assert second.asked_s - first.asked_s == pytest.approx(1.0)
    assert log.num_held == 1
    ((at_s, text),) = log.decisions
    assert at_s - first.asked_s == pytest.approx(2.864)
    assert text.startswith("Scaling engine-simulated of elastic up")


def test_rays_own_policy_takes_the_place_of_ours() -> None:
    plain = elastic_config(Prices(), {"autoscaling": {"max_replicas": 4}})["applications"][0]
    assert "deployments" not in plain
    ray, ingress = elastic_config(Prices(), {}, {"max_replicas": 4, "target_ongoing_requests": 3.0})["applications"]
    (override,) = ray["deployments"]
    assert override["name"] == "engine-simulated"
    assert override["autoscaling_config"]["target_ongoing_requests"] == 3.0
    # Serve deploys both, and the ingress takes requests with no replica behind it.
    ServeDeploySchema.model_validate(elastic_config(Prices(), {}, {"max_replicas": 4}))
    assert override["request_router_config"]["request_router_kwargs"] == {"scales_to_zero": True}
    (entry,) = IngressUserConfig.model_validate(ingress["deployments"][0]["user_config"]).models
    assert entry.application == ray["name"]
