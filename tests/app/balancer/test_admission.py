"""Through the balancer, whose clock the tests turn."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from app.balancer import Balancer, Placement, RequestCost
from app.balancer.admission import MAX_IN_SERVE
from app.balancer.admission_settings import AdmissionSettings, ClassSettings, terms_of_class
from app.balancer.reservations import News
from app.transport.messages import LoadReport

CLASSES = {"default": ClassSettings(1, 10.0), "urgent": ClassSettings(0, 10.0), "batch": ClassSettings(2, 100.0)}
# A prompt of a second.
PROMPT = 1000


class World:
    """Replicas that compute 1,000 prompt tokens a second, one request after another, and as many `seats`."""

    def __init__(
        self,
        num_replicas: int = 1,
        *,
        native: bool = False,
        hold_s: float | None = None,
        seats: int = 0,
        draw: random.Random | None = None,
        **settings: Any,
    ) -> None:
        self.now = 0.0
        self.settings = AdmissionSettings(**{"classes": CLASSES, "replica_queue_s": 0.5, **settings})
        self.balancer = Balancer(
            admission=self.settings,
            hold_s=hold_s,
            use_native=native,
            stale_after_s=math.inf,
            clock=lambda: self.now,
            draw=draw,
        )
        self.num_keys = 0
        self.seats = seats
        self.refused: dict[int, int] = {}
        self.on: dict[str, list[int]] = {}
        for _ in range(num_replicas):
            self.add_replica()

    def add_replica(self) -> None:
        name = f"r{len(self.on)}"
        self.on[name] = []
        self.balancer.add_replica(name, 16, self.load(), seats=self.seats)

    def load(self, *admitted: int, waiting: int = 0, running: int = 0) -> LoadReport:
        return LoadReport(
            num_blocks=10_000,
            num_free_blocks=10_000,
            num_empty_blocks=10_000,
            num_waiting_tokens=waiting,
            num_running=running,
            prefill_tokens_per_s=1000.0,
            decode_step_s=0.001,
            decode_sequence_s=1e-9,
            admitted=admitted,
        )

    def ask(
        self,
        name: str = "default",
        tenant: str = "",
        *,
        tokens: int = PROMPT,
        fingerprint: int = 0,
        resumes: bool = False,
        deadline_s: float | None = None,
    ) -> tuple[int, Placement]:
        self.num_keys += 1
        terms = terms_of_class(self.settings, name)._replace(tenant=tenant, fingerprint=fingerprint)
        if deadline_s is not None:
            terms = terms._replace(ttft_deadline_s=deadline_s)
        placement = self.balancer.book(self.num_keys, RequestCost(tokens, 1), (), terms, resumes=resumes)
        if placement.refusal is not None:
            self.refused[self.num_keys] = placement.refusal.retry_after_s
        return self.num_keys, placement

    def pass_time(self, seconds: float) -> list[int]:
        """Prompts are computed in their time, and requests end with them; returns who was sent meanwhile."""
        sent: list[int] = []
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now = round(self.now + 0.1, 6)
            for key in self.balancer.dispatch():
                sent.append(key)
                replica = self.balancer.replica_of(key)
                if replica is not None:
                    self.on[replica].append(key)
            for key, refusal in self.balancer.take_refused():
                self.refused[key] = refusal.retry_after_s
                self.balancer.release(key)
        return sent

    def end(self, *keys: int) -> None:
        for key in keys:
            self.balancer.computed(key)
            self.balancer.release(key)


def reason(placement: Placement) -> str | None:
    return placement.refusal.reason if placement.refusal is not None else None


@pytest.mark.parametrize("native", [False, True])
def test_while_there_is_room_nobody_waits(native: bool) -> None:
    world = World(2, native=native)
    assert world.ask()[1].replica_id is not None
    assert world.ask()[1].replica_id is not None
    # Both replicas have a second of prompt to compute: it waits here rather than there.
    key, placement = world.ask()
    assert placement.held
    assert world.balancer.num_held == 1
    assert world.balancer.queued_s == pytest.approx(1.0, rel=0.01)
    # A fiftieth of the deadline may be queued on a replica.
    assert world.pass_time(0.7) == []
    assert world.pass_time(0.2) == [key]
    assert world.balancer.num_held == 0


def test_whose_turn_would_come_too_late_is_refused_at_once_and_told_when() -> None:
    world = World()
    told = []
    for _ in range(20):
        _, placement = world.ask()
        if placement.refusal is not None:
            told.append(placement.refusal.retry_after_s)
            assert reason(placement) == "deadline"
            assert f"try again in {told[-1]} s" in placement.refusal.message
    # 10 s, less what is kept for what is not foreseen, allow for 6 to wait and be computed.
    assert world.balancer.num_held == 6
    assert told == sorted(told)
    assert len(set(told)) == len(told), "each is told a time of its own"
    assert told[0] >= 1
    counts = world.balancer.admission_state().counts
    assert counts.refused == {("default", "deadline"): 13}


def test_nobody_is_late_who_was_let_in() -> None:
    world = World()
    for _ in range(20):
        world.ask()
    held = world.balancer.num_held
    assert len(world.pass_time(9.0)) == held
    assert set(world.refused) == set(range(8, 21)), "no one was refused after having waited"
    state = world.balancer.admission_state()
    assert state.counts.admitted == {"default": held + 1}
    assert state.counts.waited_s["default"] / held == pytest.approx(3.5, abs=0.8)
    assert state.queued == {"default": 0, "urgent": 0, "batch": 0}


def test_a_slower_fleet_than_foreseen_gives_up_those_who_will_be_late() -> None:
    world = World()
    for _ in range(20):
        world.ask()
    waiting = world.balancer.num_held
    # The replica does not get on: it has always two seconds to do.
    for _ in range(120):
        world.balancer.report("r0", world.load(waiting=2000))
        world.pass_time(0.1)
    late = {key for key in world.refused if key <= waiting + 1}
    assert len(late) == waiting
    assert world.balancer.num_held == 0
    assert world.balancer.admission_state().counts.refused["default", "late"] == waiting


def test_a_promise_is_kept_though_others_are_refused() -> None:
    world = World()
    for _ in range(8):
        world.ask()
    key, placement = world.ask(fingerprint=42)
    assert placement.refusal is not None
    after_s = placement.refusal.retry_after_s
    for _ in range(after_s * 2):
        world.pass_time(0.5)
        world.ask(fingerprint=1000 + world.num_keys)
    assert reason(world.ask(fingerprint=43)[1]) == "deadline"
    key, placement = world.ask(fingerprint=42)
    assert placement.refusal is None
    assert key in world.pass_time(10.0)
    assert world.balancer.admission_state().counts.promised == {"default": 1}


def test_the_urgent_go_first_and_need_not_wait_for_others_behind_them() -> None:
    world = World()
    for _ in range(8):
        world.ask("batch")
    urgent, _ = world.ask("urgent")
    assert world.pass_time(1.0)[0] == urgent


def test_the_newest_of_the_lowest_class_makes_room() -> None:
    world = World(max_queued_requests=3)
    for _ in range(4):
        assert world.ask("batch")[1].refusal is None
    world.pass_time(0.1)
    assert world.balancer.num_held == 3
    assert reason(world.ask("batch")[1]) == "full"
    _, placement = world.ask("batch")
    assert reason(placement) == "full", "it is the newest itself"
    urgent, placement = world.ask("urgent")
    assert placement.held
    world.pass_time(0.1)
    assert world.balancer.admission_state().counts.refused == {("batch", "full"): 2, ("batch", "shed"): 1}
    assert 4 in world.refused
    assert urgent in world.pass_time(2.0)


def test_tokens_are_bounded_but_a_single_large_request_may_wait() -> None:
    world = World(max_queued_tokens=2500, classes={"default": ClassSettings(0, 1000.0)})
    world.ask(tokens=4000)
    placements = [world.ask(tokens=3000)[1] for _ in range(7)]
    assert placements[0].held
    assert "full" in {reason(placement) for placement in placements}
    assert world.balancer.num_held < 7


def test_a_tenant_that_floods_makes_no_other_wait_for_its_queue() -> None:
    world = World(classes={"default": ClassSettings(0, 1000.0)})
    for _ in range(50):
        world.ask(tenant="flood", tokens=500)
    for _ in range(2):
        assert world.ask(tenant="calm", tokens=500)[1].replica_id == "r0", "past all who wait"
    calm, placement = world.ask(tenant="calm", tokens=500)
    assert placement.held, "the replica has enough queued"
    assert world.pass_time(2.0)[0] == calm


def test_a_tenant_within_its_share_need_not_wait_for_a_replica_to_be_nearly_free() -> None:
    world = World(classes={"default": ClassSettings(0, 1000.0)})
    for _ in range(30):
        world.ask(tenant="flood", tokens=700)
    world.pass_time(5.0)
    busy_s = 1.0 - world.now % 0.7
    calm, placement = world.ask(tenant="calm", tokens=100)
    if placement.held:
        assert calm in world.pass_time(0.3), f"the replica has {busy_s:.1f} s to do, at most"
    assert world.ask(tenant="flood", tokens=100)[1].held


class Draw(random.Random):
    """Gives the least."""

    def uniform(self, a: float, b: float) -> float:  # noqa: ARG002 - as random has it
        return a


def test_ingresses_that_compete_do_not_all_send_at_the_same_moment() -> None:
    for competes in (False, True):
        world = World(classes={"default": ClassSettings(0, 1000.0)}, draw=Draw())
        if competes:
            world.balancer.hear_promises(News([], []))
        for _ in range(3):
            world.ask(tokens=1000)
        # Half a second of prompt may wait on a replica, or six tenths of that.
        sent = world.pass_time(0.6)
        assert len(sent) == (0 if competes else 1)
        assert len(world.pass_time(0.3)) == (1 if competes else 0)


def test_what_a_replica_had_begun_is_never_refused_nor_held() -> None:
    world = World()
    for _ in range(20):
        world.ask()
    assert world.ask(resumes=True)[1].replica_id == "r0"


def test_without_replicas_requests_wait_a_few_of_them_in_serve() -> None:
    world = World(0, max_queued_requests=20)
    placements = [world.ask()[1] for _ in range(MAX_IN_SERVE + 21)]
    assert [placement.held for placement in placements] == [False] * MAX_IN_SERVE + [True] * 20 + [False]
    assert reason(placements[-1]) == "full"
    # Those in Serve give up; others take their places, or no replica would be started.
    world.end(1, 2)
    assert world.pass_time(0.1) == [MAX_IN_SERVE + 1, MAX_IN_SERVE + 2]
    # However long it takes, the start makes nobody late.
    world.pass_time(300.0)
    assert len(world.refused) == 1
    world.add_replica()
    assert len(world.pass_time(5.0)) >= 4
    assert len(world.refused) == 1 + 20 - 2 - len(world.on["r0"]) - world.balancer.num_held


def test_a_replica_whose_seats_are_taken_is_not_sent_more() -> None:
    world = World(seats=4)
    keys = [world.ask(tokens=1)[0] for _ in range(5)]
    # Four run, and one waits for a seat.
    world.balancer.report("r0", world.load(*keys, running=5))
    key, placement = world.ask(tokens=1)
    assert placement.held
    assert world.pass_time(2.0) == []
    world.balancer.report("r0", world.load(running=4))
    assert world.pass_time(0.1) == [key]


def test_a_prompt_that_takes_its_whole_deadline_is_let_in_if_nobody_waits() -> None:
    world = World()
    assert world.ask(tokens=30_000, deadline_s=1.0)[1].replica_id == "r0"


def test_a_request_that_leaves_is_counted_no_more() -> None:
    world = World()
    keys = [world.ask()[0] for _ in range(8)]
    for key in keys[1:]:
        world.balancer.release(key)
    assert world.balancer.num_held == 0
    assert world.balancer.queued_s == 0.0
    assert world.balancer.next_dispatch_s() is None


def test_held_shortest_first_is_the_order_of_the_same_room() -> None:
    world = World(hold_s=0.0)
    world.ask(tokens=3000)
    long, _ = world.ask(tokens=2000)
    short, _ = world.ask(tokens=100)
    assert world.pass_time(6.0) == [short, long]


def test_settings_change_while_requests_wait() -> None:
    world = World()
    for _ in range(8):
        world.ask()
    assert reason(world.ask()[1]) == "deadline"
    world.settings = AdmissionSettings(classes={"default": ClassSettings(1, 1000.0)}, replica_queue_s=0.5)
    world.balancer.set_admission(world.settings)
    assert world.ask()[1].held
    assert len(world.pass_time(10.0)) == 7
    with pytest.raises(ValueError, match="without admission"):
        Balancer().set_admission(world.settings)
