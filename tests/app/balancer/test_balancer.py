from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.balancer import Balancer, BookingGoneError, CheapestPolicy, Choice, RequestCost
from app.balancer.fleet import Fleet
from app.balancer.prefix_index import PrefixIndex, slots_of
from app.transport.messages import LoadReport

LOAD = LoadReport(num_blocks=100, num_free_blocks=100, prefill_tokens_per_s=1000.0, decode_step_s=0.02)
COST = RequestCost(prompt_tokens=50, output_tokens=20)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Recording(CheapestPolicy):
    """The default policy; which replicas it could choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.offered: set[str] = set()

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        self.offered = {fleet.replica_ids[slot] for slot in slots_of(among)}
        return super().choose(request, fleet, among)


class BalancerMachine(RuleBasedStateMachine):
    """Replicas come, go, drain, fall silent and report; requests are booked, refused and released."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.policy = Recording()
        self.balancer = Balancer(self.policy, stale_after_s=5.0, expire_after_s=20.0, clock=self.clock)
        self.heard_at: dict[str, float] = {}
        self.draining: set[str] = set()
        self.keys: dict[int, frozenset[str]] = {}
        self.next_key = 0

    def eligible(self) -> set[str]:
        staying = self.heard_at.keys() - self.draining
        # If all are silent, silence says nothing.
        return {name for name in staying if self.clock.now_s - self.heard_at[name] <= 5.0} or staying

    names = st.sampled_from(("a", "b", "c"))

    @rule(name=names)
    def add(self, name: str) -> None:
        if name not in self.heard_at:
            self.balancer.add_replica(name, 16, LOAD)
            self.heard_at[name] = self.clock.now_s

    @rule(name=names)
    def remove(self, name: str) -> None:
        placed = {key for key in self.keys if self.balancer.replica_of(key) == name}
        assert set(self.balancer.remove_replica(name)) == placed
        self.heard_at.pop(name, None)
        self.draining.discard(name)

    @rule(name=names)
    def drain(self, name: str) -> None:
        self.balancer.set_draining(name)
        if name in self.heard_at:
            self.draining.add(name)

    @rule(name=names, waiting=st.integers(0, 500), data=st.data())
    def report(self, name: str, waiting: int, data: st.DataObject) -> None:
        admitted = tuple(data.draw(st.sets(st.sampled_from(sorted(self.keys))))) if self.keys else ()
        self.balancer.report(name, replace(LOAD, num_waiting_tokens=waiting, admitted=admitted))
        if name in self.heard_at:
            self.heard_at[name] = self.clock.now_s

    @rule(tokens=st.integers(1, 400), excluded=st.sets(names))
    def book(self, tokens: int, excluded: set[str]) -> None:
        chain = [bytes([block % 3, block]) for block in range(tokens // 16)]
        self.next_key += 1
        self.keys[self.next_key] = frozenset(excluded)
        eligible = self.eligible() - excluded
        placement = self.balancer.book(self.next_key, RequestCost(tokens, 20, 1, chain), excluded)
        assert (placement.replica_id in eligible) if eligible else placement.replica_id is None
        if eligible:
            assert self.policy.offered == eligible

    @precondition(lambda self: self.keys)
    @rule(data=st.data(), refused=st.booleans())
    def place(self, data: st.DataObject, refused: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.keys)))
        before = self.balancer.replica_of(key)
        eligible = self.eligible() - self.keys[key]
        after = self.balancer.place(key, refused=refused).replica_id
        if not refused and before is not None and before not in self.draining:
            assert after == before
        elif eligible:
            assert after in eligible
        else:
            assert after is None

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.keys)))
        del self.keys[key]
        self.balancer.release(key)
        with pytest.raises(BookingGoneError):
            self.balancer.place(key)

    @rule(seconds=st.sampled_from((1.0, 4.0, 30.0)))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        for key in self.balancer.expire():
            del self.keys[key]

    @invariant()
    def sums_match_the_bookings(self) -> None:
        assert self.balancer.num_bookings == len(self.keys)
        assert self.balancer.num_available == len(self.eligible())
        fleet = self.balancer._fleet
        assert len(fleet) == len(fleet.order) == len(self.heard_at)
        for name in self.heard_at:
            slot = fleet.slot_of(name)
            assert slot is not None
            placed = [booking for booking in self.balancer._bookings.values() if booking.replica_id == name]
            assert sorted(self.balancer.bookings_at(name)) == sorted(booking.key for booking in placed)
            unreported = [booking for booking in placed if not booking.reported]
            assert fleet.num_sequences[slot] == sum(booking.cost.num_sequences for booking in unreported)
            assert fleet.num_blocks_taken[slot] == sum(booking.num_new_blocks for booking in unreported)
            # Two bookings may wait for one block; the first that ends takes it off.
            announced = [booking for booking in placed if booking.is_expected]
            blocks = {item for one in announced for item in one.cost.block_hashes[one.num_cached_blocks :]}
            assert isinstance(fleet.expected, PrefixIndex)
            assert fleet.expected.held(slot) <= blocks

    def teardown(self) -> None:
        for key in list(self.keys):
            self.balancer.release(key)
        assert self.balancer.num_bookings == 0
        fleet = self.balancer._fleet
        assert not len(fleet.expected)
        assert not any(fleet.num_sequences)
        assert not any(fleet.num_blocks_taken)


BalancerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestBalancerMachine = BalancerMachine.TestCase


def test_bookings_of_the_same_millisecond_see_each_other() -> None:
    balancer = Balancer()
    for name in ("a", "b", "c", "d"):
        balancer.add_replica(name, 16, LOAD)
    placed = [balancer.book(key, COST).replica_id for key in range(8)]
    assert sorted(map(str, placed)) == ["a", "a", "b", "b", "c", "c", "d", "d"]


def test_a_booking_counts_until_the_report_includes_it() -> None:
    balancer = Balancer()
    balancer.add_replica("a", 16, LOAD)
    balancer.add_replica("b", 16, LOAD)
    assert balancer.book(1, RequestCost(400, 20)).replica_id == "a"
    balancer.report("a", replace(LOAD, admitted=(1,)))
    # The replica says that it includes the request and has nothing to do: it is believed.
    assert balancer.book(2, COST).replica_id == "b"
    assert balancer.book(3, COST).replica_id == "a"


def test_a_failing_policy_costs_balance_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(CheapestPolicy):
        def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
            raise ZeroDivisionError(len(fleet) + request.prompt_tokens + among)

    class OutOfRange(CheapestPolicy):
        def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
            return Choice(len(fleet) + request.prompt_tokens + among, 0, 0.0)

    for policy in (Broken(), OutOfRange()):
        balancer = Balancer(policy)
        balancer.add_replica("a", 16, LOAD)
        balancer.add_replica("b", 16, LOAD)
        assert [balancer.book(key, COST).replica_id for key in range(4)] == ["a", "b", "a", "b"]
    assert "ZeroDivisionError" in caplog.text
    assert "IndexError" in caplog.text


def test_a_replica_that_refused_is_asked_again_only_after_all_others() -> None:
    balancer = Balancer()
    for name in ("a", "b", "c"):
        balancer.add_replica(name, 16, LOAD)
    tried = [balancer.book(1, COST).replica_id]
    tried += [balancer.place(1, refused=True).replica_id for _ in range(3)]
    assert sorted(map(str, tried[:3])) == ["a", "b", "c"]
    assert tried[3] is not None
    assert balancer.place(1).num_moves == 3


def test_threads_neither_lose_nor_leak_bookings() -> None:
    balancer = Balancer()
    for name in ("a", "b"):
        balancer.add_replica(name, 16, LOAD)

    def work(first: int) -> None:
        for key in range(first, first + 300):
            balancer.book(key, COST)
            balancer.place(key, refused=key % 3 == 0)
            balancer.report("a", LoadReport(num_blocks=9, num_free_blocks=9, admitted=(key,)))
            balancer.release(key)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 4000, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert balancer.num_bookings == 0
    assert not balancer.bookings_at("a")
    assert not balancer.bookings_at("b")
    assert not any(balancer._fleet.num_blocks_taken)


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}{index}".encode() for index in range(length)]


def prompt(name: str, num_blocks: int) -> RequestCost:
    return RequestCost(16 * num_blocks + 1, 20, 1, chain(name, num_blocks))


def test_a_request_follows_its_prefix_unless_waiting_costs_more() -> None:
    balancer = Balancer()
    for name in ("a", "b"):
        balancer.add_replica(name, 16, LOAD)
    balancer.blocks_changed("b", chain("x", 10), ())
    assert balancer.book(1, prompt("x", 12)).replica_id == "b"
    receipt = balancer.receipt(1)
    assert receipt is not None
    assert (receipt.replica_id, receipt.cached_tokens) == ("b", 160)
    balancer.report("b", replace(LOAD, num_waiting_tokens=500))
    assert balancer.book(2, prompt("x", 12)).replica_id == "a"
    balancer.blocks_changed("b", (), chain("x", 10))
    assert balancer.book(3, prompt("x", 3)).replica_id == "a"


def test_what_noise_makes_of_equal_replicas_sends_no_request_away_from_its_prefix() -> None:
    balancer = Balancer()
    measured = {"a": 0.0004, "b": 0.0016}
    for name, seconds in measured.items():
        noisy = replace(LOAD, num_running=8, decode_sequence_s=seconds, decode_sequence_error_s=0.001)
        balancer.add_replica(name, 16, noisy)
        balancer.report(name, noisy)
    balancer.blocks_changed("b", chain("x", 10), ())
    assert balancer.book(1, prompt("x", 12)).replica_id == "b"
    # Did it know that this is no noise, ten blocks would not be worth that.
    for name, seconds in measured.items():
        for _ in range(2):
            balancer.report(name, replace(LOAD, num_running=8, decode_sequence_s=seconds))
    assert balancer.book(2, prompt("x", 12)).replica_id == "a"


def test_equal_prompts_of_the_same_millisecond_meet() -> None:
    balancer = Balancer()
    for name in ("a", "b", "c"):
        balancer.add_replica(name, 16, LOAD)
    at = balancer.book(1, prompt("x", 20)).replica_id
    # Nothing is cached yet, but will be when the second one's turn comes.
    assert balancer.book(2, prompt("x", 20)).replica_id == at
    receipt = balancer.receipt(2)
    assert receipt is not None
    assert receipt.cached_tokens == 320
    balancer.release(1)
    balancer.release(2)
    assert not len(balancer._fleet.expected)


def test_an_old_report_does_not_bring_back_work_that_is_done() -> None:
    clock = Clock()
    balancer = Balancer(clock=clock)
    for name in ("a", "b"):
        balancer.add_replica(name, 16, LOAD)
    clock.now_s += 1.0
    balancer.report("a", replace(LOAD, num_waiting_tokens=1000), age_s=1.0)
    balancer.report("b", replace(LOAD, num_waiting_tokens=100))
    assert balancer.book(1, COST).replica_id == "a"


def test_a_silent_replica_costs_its_silence_and_then_is_not_chosen() -> None:
    clock = Clock()
    balancer = Balancer(silent_after_s=2.0, stale_after_s=6.0, clock=clock)
    for name in ("a", "b"):
        balancer.add_replica(name, 16, LOAD)
    balancer.blocks_changed("b", chain("x", 100), ())
    balancer.report("a", replace(LOAD, num_waiting_tokens=4000))
    clock.now_s += 1.0
    balancer.heard("a")
    assert balancer.book(1, prompt("y", 1)).replica_id == "b"
    clock.now_s += 1.5
    balancer.heard("a")
    # 1.5 s of work are left at a; b has been silent for 2.5 s, which only a long match outweighs.
    assert balancer.book(2, prompt("y", 1)).replica_id == "a"
    assert balancer.book(3, prompt("x", 100)).replica_id == "b"
    clock.now_s += 4.0
    balancer.heard("a")
    assert balancer.book(4, prompt("x", 100)).replica_id == "a"
    balancer.heard("b")
    assert balancer.book(5, prompt("x", 100)).replica_id == "b"


def test_if_all_replicas_are_silent_requests_are_placed_all_the_same() -> None:
    clock = Clock()
    balancer = Balancer(silent_after_s=2.0, stale_after_s=6.0, clock=clock)
    for name in ("a", "b"):
        balancer.add_replica(name, 16, LOAD)
    balancer.blocks_changed("b", chain("x", 100), ())
    clock.now_s += 60.0
    assert balancer.num_available == 2
    assert balancer.book(1, prompt("x", 100)).replica_id == "b"
    assert balancer.place(1, refused=True).replica_id == "a"
    balancer.heard("a")
    assert balancer.book(2, prompt("x", 100)).replica_id == "a"


def test_held_requests_go_when_a_replica_comes_free_the_shortest_first() -> None:
    clock = Clock()
    balancer = Balancer(hold_s=0.0, clock=clock)
    balancer.add_replica("a", 16, LOAD)
    assert balancer.book(1, RequestCost(1000, 1)).replica_id == "a"
    assert balancer.book(2, RequestCost(500, 1)).held
    assert balancer.book(3, RequestCost(100, 1)).held
    assert balancer.num_held == 2
    assert balancer.next_dispatch_s() == pytest.approx(1.0)
    assert balancer.dispatch() == []
    clock.now_s += 1.0
    assert balancer.dispatch() == [3]
    assert balancer.replica_of(3) == "a"
    clock.now_s += 0.1
    assert balancer.dispatch() == [2]
    assert balancer.num_held == 0
    assert balancer.next_dispatch_s() is None


def test_a_request_held_for_long_goes_to_a_busy_replica() -> None:
    clock = Clock()
    balancer = Balancer(hold_s=0.0, clock=clock)
    balancer.add_replica("a", 16, LOAD)
    balancer.book(1, RequestCost(10**6, 1))
    assert balancer.book(2, COST).held
    assert balancer.next_dispatch_s() == pytest.approx(30.0)
    clock.now_s += 29.0
    assert balancer.dispatch() == []
    clock.now_s += 1.0
    assert balancer.dispatch() == [2]
    assert balancer.replica_of(2) == "a"


def test_nothing_stays_held_when_its_replicas_go() -> None:
    balancer = Balancer(hold_s=0.0)
    balancer.add_replica("a", 16, LOAD)
    balancer.book(1, RequestCost(1000, 1))
    assert balancer.book(2, COST).held
    assert balancer.remove_replica("a") == [1]
    assert balancer.dispatch() == [2]
    assert balancer.replica_of(2) is None
    balancer.release(2)
    assert balancer.num_bookings == 1


def adapted(*adapters: str, num_free_slots: int = 1, num_waiting_tokens: int = 0) -> LoadReport:
    return replace(
        LOAD,
        adapters=adapters,
        num_free_adapter_slots=num_free_slots,
        adapter_load_s=0.5,
        num_waiting_tokens=num_waiting_tokens,
    )


@pytest.mark.parametrize("use_native", [False, True])
def test_a_request_goes_where_its_adapter_is_unless_that_costs_more_than_loading_it(use_native: bool) -> None:
    balancer = Balancer(use_native=use_native, clock=Clock())
    sql, base = COST._replace(adapter="sql"), COST
    for name, load in (("a", adapted()), ("b", adapted("chat", "sql")), ("c", adapted("chat"))):
        balancer.add_replica(name, 16, load)
    assert balancer.book(1, sql).replica_id == "b"
    assert balancer.book(2, base).replica_id == "a", "the base is everywhere"
    for key in (1, 2):
        balancer.release(key)
    # A queue of 0.4 s is shorter than a load of 0.5 s, one of 0.6 s is not.
    balancer.report("b", adapted("chat", "sql", num_waiting_tokens=400))
    assert balancer.book(3, sql).replica_id == "b"
    balancer.release(3)
    balancer.report("b", adapted("chat", "sql", num_waiting_tokens=600))
    assert balancer.book(4, sql).replica_id == "a"
    receipt = balancer.receipt(4)
    assert receipt is not None
    assert receipt.adapter_s == pytest.approx(0.5)
    # What is booked there brings the adapter: the next one need not pay for it, wherever the queue is shorter.
    assert balancer.book(5, sql).replica_id == "a"
    following = balancer.receipt(5)
    assert following is not None
    assert following.adapter_s == 0.0


@pytest.mark.parametrize("use_native", [False, True])
def test_a_replica_whose_slots_are_in_use_is_no_place_for_another_adapter(use_native: bool) -> None:
    balancer = Balancer(use_native=use_native, clock=Clock())
    balancer.add_replica("full", 16, adapted("chat", num_free_slots=0))
    balancer.add_replica("roomy", 16, adapted("chat", num_waiting_tokens=300))
    # A wait of 0.3 s there, of 20 tokens at 20 ms here.
    assert balancer.book(1, COST._replace(adapter="sql")).replica_id == "roomy"
    assert balancer.book(2, COST._replace(adapter="chat")).replica_id == "full"


@pytest.mark.parametrize("use_native", [False, True])
def test_the_one_replica_of_many_that_has_the_adapter_is_found(use_native: bool) -> None:
    balancer = Balancer(use_native=use_native, clock=Clock())
    for number in range(40):
        # The emptiest ones, which alone are looked at among so many alike, lack it.
        has_it = number == 37
        load = adapted("sql", num_waiting_tokens=200) if has_it else adapted(num_waiting_tokens=number)
        balancer.add_replica(f"r{number}", 16, load)
    assert balancer.book(1, COST._replace(adapter="sql")).replica_id == "r37"


def test_what_a_replica_takes_with_it() -> None:
    balancer = Balancer(clock=Clock())
    balancer.add_replica("a", 16, adapted("sql"))
    balancer.book(1, COST._replace(adapter="chat"))
    assert balancer.remove_replica("a") == [1]
    balancer.add_replica("b", 16, adapted())
    sql = COST._replace(adapter="sql")
    assert balancer.book(2, sql).replica_id == "b"
    receipt = balancer.receipt(2)
    assert receipt is not None
    assert receipt.adapter_s == pytest.approx(0.5), "what a had is gone"
    balancer.computed(2)
    balancer.release(2)
    balancer.release(1)
    assert balancer._fleet.adapters.holders("chat") == 0
