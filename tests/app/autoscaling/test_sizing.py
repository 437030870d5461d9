"""Sizing on sequences of observations, with a clock that only the test moves."""

from __future__ import annotations

import math

import pytest

from app.autoscaling.report import Observation, ReplicaReport
from app.autoscaling.sizing import Decision, Sizer, SizingRules, late_wait_s, queued_s

RULES = SizingRules(1, 8, upscale_delay_s=0.0, downscale_delay_s=10.0, ttft_target_s=2.0)
# What a replica computes in a second, and a request's prompt: twenty requests a second fill a replica.
CAPACITY = 10_000.0
PROMPT = 500.0


class Service:
    """A model's replicas as the policy sees them: exports twice a second, starts that take a while.

    Attributes:
        replicas: work offered, in replicas.
        waiting_s, queued_s: seconds of one replica's work on replicas, and in ingresses.
    """

    def __init__(self, rules: SizingRules = RULES, running: int = 1, start_s: float = 4.0) -> None:
        self.sizer = Sizer(rules)
        self.now_s = 100.0
        self.target = self.running = running
        self.start_s = start_s
        self.starts: list[float] = []
        self.counters = [[0.0] * 4 for _ in range(running)]
        self.waiting_s = self.queued_s = self.kv_use = self.open_requests = 0.0
        self.num_running = 0.0
        self.output_tokens = 10.0
        self.pace_s = 0.02
        self.decisions: list[Decision] = []

    def run(self, seconds: float, replicas: float) -> Decision:
        """Let time pass under so much work."""
        decision = Decision(self.target, "", "")
        for _ in range(round(seconds * 10)):
            self.now_s += 0.1
            while self.starts and self.starts[0] <= self.now_s:
                self.starts.pop(0)
                self.running += 1
                self.counters.append([0.0] * 4)
            requests = replicas * CAPACITY / PROMPT * 0.1
            for counter in self.counters:
                share = requests / len(self.counters)
                counter[0] += share
                counter[1] += share * PROMPT
                counter[2] += share * self.output_tokens
                counter[3] += share * self.output_tokens
            decision = self.sizer.decide(self.observation(replicas))
            self.decisions.append(decision)
            for _ in range(self.target, decision.num_replicas):
                self.starts.append(self.now_s + self.start_s)
            if decision.num_replicas < self.target:
                self.starts.clear()
                self.running = min(self.running, decision.num_replicas)
                del self.counters[self.running :]
            self.target = decision.num_replicas
        return decision

    def observation(self, replicas: float) -> Observation:
        running = self.num_running or replicas * CAPACITY / PROMPT * self.output_tokens * self.pace_s
        each = max(len(self.counters), 1)
        reports = {
            f"r{number}": ReplicaReport(
                offered_requests=counter[0],
                offered_prompt_tokens=counter[1],
                offered_prompt_squares=2 * counter[1] * PROMPT,
                offered_output_tokens=counter[2],
                queued_s=self.queued_s / each,
                demand_shares=1.0 / each,
                num_ingresses=1,
                num_waiting_tokens=self.waiting_s / each * CAPACITY,
                num_running=running / each,
                num_output_tokens=counter[3],
                kv_use=self.kv_use / each,
                prompt_tokens_per_s=CAPACITY,
                max_num_seqs=256,
            )
            for number, counter in enumerate(self.counters)
        }
        return Observation(self.now_s, self.target, self.running, reports, self.open_requests)


@pytest.mark.parametrize(("replicas", "needed"), [(0.3, 1), (0.7, 1), (1.2, 2), (3.0, 4), (6.0, 8), (30.0, 8)])
def test_so_many_as_the_load_needs_within_the_bounds(replicas: float, needed: int) -> None:
    service = Service()
    service.run(40.0, replicas)
    assert service.target == needed
    assert len({decision.num_replicas for decision in service.decisions[150:]}) == 1, "it comes to rest"


def test_more_are_asked_for_within_five_seconds_of_need() -> None:
    service = Service()
    service.run(30.0, 0.5)
    assert service.target == 1
    service.run(5.0, 2.0)
    assert service.target >= 3


def test_what_starts_is_counted() -> None:
    service = Service(start_s=20.0)
    service.run(10.0, 2.0)
    asked = service.target
    service.run(9.0, 2.0)
    assert (service.target, service.running) == (asked, 1)


def test_a_ramp_is_foreseen_by_the_time_that_a_start_takes() -> None:
    service = Service(start_s=6.0)
    service.run(20.0, 1.0)
    for tenth in range(300):
        service.run(0.1, 1.0 + tenth / 100)
        assert service.running >= 0.75 + tenth / 100, f"short of replicas after {tenth / 10} s"


def test_fewer_only_after_the_delay_and_never_below_the_highest_need_within_it() -> None:
    service = Service(running=4)
    service.run(30.0, 3.0)
    assert service.target == 4
    service.run(8.0, 0.5)
    assert service.target == 4
    service.run(4.0, 3.0)
    service.run(9.0, 0.5)
    assert service.target == 4, "the load came back within the delay"
    service.run(15.0, 0.5)
    assert service.target == 1


def test_a_replica_stays_that_the_others_could_not_spare() -> None:
    # 1.55 of 2 replicas is 78 %; a tenth more would be above the 80 % that are allowed.
    service = Service(RULES._replace(ttft_target_s=20.0), running=3)
    service.run(60.0, 1.55)
    assert service.target == 3
    service = Service(RULES._replace(ttft_target_s=20.0, downscale_margin=0.0), running=3)
    service.run(60.0, 1.55)
    assert service.target == 2


@pytest.mark.parametrize("where", ["waiting_s", "queued_s"])
def test_work_that_waits_asks_for_more(where: str) -> None:
    service = Service()
    service.run(20.0, 0.5)
    setattr(service, where, 30.0)
    decision = service.run(0.1, 0.5)
    assert decision.num_replicas >= 3
    assert decision.cause == "queue"


def test_a_queue_within_the_target_asks_for_nothing() -> None:
    service = Service()
    service.run(20.0, 0.5)
    service.waiting_s = 0.9
    assert service.run(5.0, 0.5).num_replicas == 1


@pytest.mark.parametrize(("field", "value", "cause"), [("kv_use", 1.8, "kv"), ("num_running", 500.0, "sequences")])
def test_room_for_blocks_and_sequences_is_needed_too(field: str, value: float, cause: str) -> None:
    service = Service()
    service.run(20.0, 0.3)
    setattr(service, field, value)
    decision = service.run(0.1, 0.3)
    assert (decision.num_replicas, decision.cause) == (3, cause)


def test_a_delay_before_more_are_started() -> None:
    service = Service(RULES._replace(upscale_delay_s=3.0))
    service.run(20.0, 0.5)
    service.waiting_s = 30.0
    assert service.run(2.9, 0.5).num_replicas == 1
    assert service.run(0.3, 0.5).num_replicas > 1
    service = Service(RULES._replace(upscale_delay_s=3.0))
    service.run(20.0, 0.5)
    for _ in range(5):
        service.waiting_s = 30.0
        service.run(2.0, 0.5)
        service.waiting_s = 0.0
        service.run(0.5, 0.5)
    assert service.target == 1, "a need that passes starts the delay again"


ZERO = RULES._replace(min_replicas=0, idle_to_zero_s=15.0)


def test_an_idle_model_goes_and_one_in_use_stays() -> None:
    service = Service(ZERO)
    service.run(20.0, 0.2)
    assert service.run(14.0, 0.0).num_replicas == 1
    assert service.run(3.0, 0.0).num_replicas == 0
    assert Decision(0, "idle", "nothing was asked for in 15 s") in service.decisions


@pytest.mark.parametrize("field", ["num_running", "queued_s", "open_requests"])
def test_a_model_is_not_idle_while_a_request_is_anywhere(field: str) -> None:
    service = Service(ZERO)
    setattr(service, field, 0.1)
    assert service.run(40.0, 0.0).num_replicas == 1


def test_without_idle_time_the_last_replica_stays() -> None:
    service = Service()
    assert service.run(1000.0, 0.0).num_replicas == 1


def test_no_replica_is_sent_away_while_it_starts() -> None:
    sizer = Sizer(ZERO)
    assert sizer.decide(Observation(1.0, 1, 0, {}, 0.0)).num_replicas == 1
    assert sizer.decide(Observation(1.0, 0, 0, {}, 0.0)).num_replicas == 0
    assert Sizer(RULES).decide(Observation(1.0, 0, 0, {}, 0.0)).num_replicas == 1


def test_a_model_whose_starts_fail_goes_back_to_none_and_is_tried_again() -> None:
    def targets(sizer: Sizer, began_s: float, failed: list[int]) -> list[int]:
        seen = [Observation(began_s + second, 1, 0, {}, 1.0, number) for second, number in enumerate(failed)]
        return [sizer.decide(one).num_replicas for one in seen]

    sizer = Sizer(ZERO)
    # What has failed before this start counts no more.
    assert targets(sizer, 0.0, [7, 7, 8, 8, 9, 9, 9, 9]) == [1, 1, 1, 1, 1, 1, 1, 0]
    assert sizer.decide(Observation(8.0, 0, 0, {}, 0.0, 9)).num_replicas == 0
    assert targets(sizer, 9.0, [9, 10, 10, 10, 10, 10]) == [1] * 6, "one may be chance"
    assert sizer.decide(Observation(20.0, 1, 1, {}, 0.0, 10)).num_replicas == 1
    assert set(targets(Sizer(RULES), 0.0, [0, 1, 2, 3, 4, 5, 6, 7, 8])) == {1}, "it is to have one at least"


def test_a_replica_that_has_not_reported_is_not_idle() -> None:
    sizer = Sizer(ZERO)
    decisions = [sizer.decide(Observation(float(second), 1, 1, {}, 0.0)) for second in range(60)]
    assert {decision.num_replicas for decision in decisions} == {1}


def test_the_reason_names_what_it_rests_on() -> None:
    service = Service()
    service.run(20.0, 0.5)
    service.queued_s = 30.0
    reason = service.run(0.1, 0.5).reason
    assert "prompts ask for 0.5" in reason
    assert "30.0 s wait" in reason
    assert "\n" not in reason


def test_what_waits_is_counted_once_while_a_replica_is_new() -> None:
    told = ReplicaReport(queued_s=6.0, demand_shares=1.0, num_ingresses=1)
    # The ingress told the first of all that waits when it was the only one, then the second of its half.
    new = ReplicaReport(queued_s=3.0, demand_shares=0.5, num_ingresses=1)
    assert queued_s([told, new]) == pytest.approx(6.0)
    half = ReplicaReport(queued_s=4.0, demand_shares=1.0, num_ingresses=2)
    assert queued_s([half, half]) == pytest.approx(8.0), "two ingresses, of each a half on both"
    assert queued_s([]) == 0.0
    assert queued_s([ReplicaReport()]) == 0.0


def test_waiting_in_a_queue_of_one_server_is_the_exponential_of_m_m_1() -> None:
    # M/M/1: P(wait > t) = rho exp(-(1 - rho) t / s).
    wait_s = late_wait_s(1, 0.5, 0.2, 0.05)
    assert 0.5 * math.exp(-0.5 * wait_s / 0.2) == pytest.approx(0.05)
    # Erlang C of two servers at 1.2: 0.45.
    assert math.log(0.45 / 0.05) * 0.2 / 0.8 == pytest.approx(late_wait_s(2, 1.2, 0.2, 0.05))
    assert late_wait_s(2, 2.0, 0.2, 0.05) == math.inf
    assert late_wait_s(2, 0.0, 0.2, 0.05) == 0.0
    assert late_wait_s(8, 1.0, 0.2, 0.05) == 0.0, "fewer wait at all"
