"""A replica's block log and the ingress that follows it, over frames that get lost."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.balancer.block_follower import BlockFollower
from app.replica.block_log import BlockLog
from app.transport.block_messages import decode_blocks, decode_snapshot
from app.transport.frames import FrameDecoder
from app.transport.messages import Kind
from engine.memory import BlockChanges


def block(number: int) -> bytes:
    return number.to_bytes(16, "big") if number % 2 else number.to_bytes(16, "little")


class Index:
    """The balancer's part: what it was told."""

    def __init__(self) -> None:
        self.hashes: set[Hashable] = set()

    def blocks_changed(self, replica_id: str, stored: Iterable[Hashable], removed: Iterable[Hashable]) -> None:
        assert replica_id == "a"
        self.hashes |= set(stored)
        self.hashes -= set(removed)

    def blocks_replaced(self, replica_id: str, hashes: Iterable[Hashable]) -> None:
        assert replica_id == "a"
        self.hashes = set(hashes)


class Following:
    """One log and one follower; frames pass unless dropped."""

    def __init__(self) -> None:
        self.log = BlockLog(clock=lambda: 0.0)
        self.index = Index()
        self.follower = BlockFollower("a", self.index)
        self.held: set[bytes] = set()

    def connect(self) -> None:
        self.deliver(self.log.since(self.follower.connected()))

    def change(self, stored: Iterable[int], removed: Iterable[int]) -> bytes:
        changes = BlockChanges([block(n) for n in stored], [block(n) for n in removed])
        self.held |= set(changes.stored)
        self.held -= set(changes.removed)
        return self.log.add(changes)

    def deliver(self, data: bytes) -> None:
        for frame in FrameDecoder().feed(data):
            if frame.kind == Kind.BLOCKS:
                ask = self.follower.changed(decode_blocks(frame))
            else:
                ask = self.follower.replaced(decode_snapshot(frame))
            if ask is not None:
                self.deliver(self.log.since(ask))


class LossyMachine(RuleBasedStateMachine):
    """Messages get lost and lines break; whenever the follower says that it is in step, it is."""

    def __init__(self) -> None:
        super().__init__()
        self.following = Following()
        self.following.connect()

    numbers = st.sets(st.integers(0, 30), max_size=6)

    @rule(stored=numbers, removed=numbers, lost=st.booleans())
    def change(self, stored: set[int], removed: set[int], lost: bool) -> None:
        frame = self.following.change(stored - removed, removed)
        if not lost:
            self.following.deliver(frame)
            assert self.following.follower.in_step
            assert self.following.index.hashes == self.following.held

    @rule()
    def reconnect(self) -> None:
        self.following.index.hashes = set()
        self.following.connect()
        assert self.following.follower.in_step
        assert self.following.index.hashes == self.following.held

    @invariant()
    def the_log_holds_what_the_cache_does(self) -> None:
        assert len(self.following.log) == len(self.following.held)


LossyMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestLossyMachine = LossyMachine.TestCase


def kinds(data: bytes) -> list[int]:
    return [frame.kind for frame in FrameDecoder().feed(data)]


def test_a_short_absence_costs_a_replay_and_a_long_one_a_snapshot() -> None:
    following = Following()
    following.connect()
    following.deliver(following.change([1, 2], []))
    following.change([3], [])
    following.change([4], [1])
    assert kinds(following.log.since(1)) == [Kind.BLOCKS, Kind.BLOCKS]
    for number in range(2000):
        following.change([100 + number], [])
    assert kinds(following.log.since(1)) == [Kind.SNAPSHOT]
    following.connect()
    assert following.index.hashes == following.held


def test_a_copy_that_is_wrong_is_found_out_by_its_digest_and_mended() -> None:
    following = Following()
    following.connect()
    following.deliver(following.change([1, 2], []))
    following.follower._hashes.add(block(9))
    following.follower._digest ^= int.from_bytes(block(9)[:8], "little")
    following.deliver(following.change([3], []))
    assert following.follower.in_step
    assert following.index.hashes == following.held == {block(1), block(2), block(3)}


def test_the_age_of_what_is_dropped_is_known() -> None:
    now = 0.0
    log = BlockLog(clock=lambda: now)
    log.add(BlockChanges([block(1)], []))
    assert log.cache_age_s == 0.0
    now = 40.0
    log.add(BlockChanges([], [block(1)]))
    assert log.cache_age_s == 40.0
