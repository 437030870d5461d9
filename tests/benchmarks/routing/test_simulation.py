from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from app.balancer import make_policy
from app.balancer.policies import POLICIES
from benchmarks.routing.replica import Progress, ReplicaModel
from benchmarks.routing.report import quantile, summary
from benchmarks.routing.simulation import FleetSetup, Outcome, Simulation
from benchmarks.routing.trace import Arrival, TracedRequest, arrivals, ideal_hit_rate, read_trace

MODEL = ReplicaModel(num_blocks=200, prefill_tokens_per_s=6000.0, token_s=0.02)


def conversations(num_requests: int, seed: int) -> list[TracedRequest]:
    """Turns of conversations that all begin with block 0, as in Mooncake's trace."""
    draw = random.Random(seed)
    chains: list[list[int]] = []
    next_block = 1
    trace = []
    for number in range(num_requests):
        if chains and draw.random() < 0.5:
            chain = chains.pop(draw.randrange(len(chains)))
        else:
            chain = [0]
        grown = chain + list(range(next_block, next_block + draw.randint(1, 20)))
        next_block = grown[-1] + 1
        chains.append(grown)
        tokens = len(grown) * 512 - draw.randint(0, 511)
        trace.append(TracedRequest(number // 7 * 3000.0, tokens, draw.randint(1, 400), tuple(grown)))
    return trace


TRACE = conversations(400, seed=1)


def run(name: str, **options: object) -> Outcome:
    setup = FleetSetup(**{"num_replicas": 4, "model": MODEL, **options})  # type: ignore[arg-type]
    return Simulation(setup, lambda: make_policy(name)).run(arrivals(TRACE, 3000.0, seed=2))


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_is_served_once_and_judged_right(name: str) -> None:
    outcome = run(name)
    assert len(outcome.ttft_s) == len(outcome.decision_us) == 400
    assert outcome.prompt_tokens == sum(request.input_length for request in TRACE)
    # Nothing is late, so what the balancer expects to be cached is.
    assert outcome.misjudged_requests == 0
    assert sum(outcome.busy_s) == pytest.approx((outcome.prompt_tokens - outcome.cached_tokens) / 6000.0)
    assert summary(outcome)["hit_rate"] <= ideal_hit_rate(TRACE)


def test_the_same_seed_gives_the_same_run() -> None:
    assert run("cheapest", hold_s=0.0).ttft_s == run("cheapest", hold_s=0.0).ttft_s


def test_the_default_beats_those_that_see_less() -> None:
    ours = summary(run("cheapest"))["ttft_mean_s"]
    for name in ("round_robin", "power_of_two", "least_tokens"):
        assert ours < summary(run(name))["ttft_mean_s"]


def test_holding_serves_everyone_and_shortens_the_mean() -> None:
    held, sent = run("cheapest", hold_s=0.0), run("cheapest")
    assert len(held.ttft_s) == 400
    assert summary(held)["ttft_mean_s"] < summary(sent)["ttft_mean_s"]


def test_stale_reports_cost_hits_but_never_requests() -> None:
    outcome = run("cheapest", staleness_s=1.0, num_ingresses=3, hold_s=0.0)
    assert len(outcome.ttft_s) == 400
    assert outcome.misjudged_requests > 0


def test_a_replica_computes_in_turn_and_forgets_the_least_recently_used() -> None:
    events: list[float] = []
    model = ReplicaModel(num_blocks=3, prefill_tokens_per_s=512.0, token_s=0.1)
    replica = model.make_replica(lambda time_s, _: events.append(time_s))
    nothing = Progress(lambda: None, lambda _: None)
    first = Arrival(0.0, TracedRequest(0.0, 1024, 10, (0, 1)), 0)
    admission = replica.admit(first, 0.0, nothing)
    assert (events, admission.cached_tokens) == ([2.0, 3.0], 0)
    assert sorted(admission.stored) == [0, 1]
    second = replica.admit(Arrival(1.0, TracedRequest(0.0, 1536, 10, (0, 2, 3)), 0), 1.0, nothing)
    assert events[2] == pytest.approx(4.0)
    assert second.cached_tokens == 512
    assert second.removed == [1]
    assert replica.load(1.0, ()).num_waiting_tokens == 1536
    assert replica.load(3.0, ()).cache_age_s == 2.0


def test_copies_share_no_block_and_keep_their_time() -> None:
    found = arrivals(TRACE, 3000.0, seed=0, copies=3)
    assert len(found) == 1200
    assert [arrival.time_s for arrival in found] == sorted(arrival.time_s for arrival in found)
    blocks = [
        {block for arrival in found if arrival.hash_offset == offset for block in arrival.chain}
        for offset in {arrival.hash_offset for arrival in found}
    ]
    assert len(blocks) == 3
    assert not blocks[0] & blocks[1]
    assert not blocks[1] & blocks[2]
    assert arrivals(TRACE, 3000.0, seed=0) == arrivals(TRACE, 3000.0, seed=0)


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    good = {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [0]}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"timestamp": 0}) + "\n")
    with pytest.raises(ValueError, match="line 2: no request of Mooncake's format"):
        read_trace(path)
    path.write_text(json.dumps(good) + "\n")
    assert read_trace(path) == [TracedRequest(0.0, 5, 1, (0,))]
    path.write_text("")
    with pytest.raises(ValueError, match="holds no requests"):
        read_trace(path)


def test_quantiles_are_of_the_list() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert quantile([1.0], 0.99) == 1.0
