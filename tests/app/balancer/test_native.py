from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.balancer import Balancer, CheapestPolicy, RequestCost, native
from app.balancer.booking import Booking
from app.balancer.native import NativeFleet, NativeOrder, NativePlacer
from app.balancer.placer import Placer
from app.balancer.prefix_index import PrefixIndex
from app.transport.messages import LoadReport
from engine.errors import ConfigError

ADAPTERS = ("sql", "chat", "rare")

needs_library = pytest.mark.skipif(not native.is_available(), reason="libquire_balancer.so is not built")


class Clock:
    def __init__(self) -> None:
        self.now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def report_of(draw: random.Random, admitted: tuple[int, ...] = ()) -> LoadReport:
    num_free = draw.randint(0, 60)
    return LoadReport(
        num_blocks=60,
        num_free_blocks=num_free,
        num_empty_blocks=draw.randint(0, num_free),
        cache_age_s=draw.choice([0.0, draw.uniform(0, 300)]),
        num_waiting=draw.randint(0, 3),
        num_running=draw.randint(0, 8),
        num_waiting_tokens=draw.choice([0, draw.randint(0, 3000)]),
        prefill_tokens_per_s=draw.choice([0.0, 1000.0, draw.uniform(500, 4000)]),
        decode_step_s=draw.choice([0.0, draw.uniform(0.005, 0.1)]),
        decode_sequence_s=draw.choice([0.0, draw.uniform(1e-5, 1e-2)]),
        admitted=admitted,
        adapters=tuple(draw.sample(ADAPTERS, draw.randint(0, 2))),
        num_free_adapter_slots=draw.randint(0, 2),
        adapter_load_s=draw.choice([0.0, draw.uniform(0.01, 2.0)]),
    )


class Pair:
    """A balancer in Python and one with the core: told the same, they must say the same."""

    def __init__(self, hold_s: float | None) -> None:
        self.clock = Clock()
        self.python, self.native = (
            Balancer(hold_s=hold_s, stale_after_s=5.0, use_native=use_native, clock=self.clock)
            for use_native in (False, True)
        )
        assert isinstance(self.native._fleet, NativeFleet)
        assert type(self.python._placing._placer) is Placer

    def both(self, method: str, *args: object) -> object:
        left, right = (getattr(balancer, method)(*args) for balancer in (self.python, self.native))
        assert left == right, f"{method}{args}"
        return left


@needs_library
@pytest.mark.parametrize(("seed", "num_replicas"), [*((seed, 5) for seed in range(12)), (1, 40), (2, 400)])
def test_both_decide_alike_whatever_happens(seed: int, num_replicas: int) -> None:
    draw = random.Random(seed)
    pair = Pair(draw.choice([None, 0.0, 0.2]))
    names = [f"r{number}" for number in range(num_replicas)]
    # Chains that share beginnings, all of them the first block.
    chains = [[0, *(100 * draw.randint(1, 3) + block for block in range(draw.randint(0, 30)))] for _ in range(20)]
    for name in names[: max(num_replicas - 2, 1)]:
        pair.both("add_replica", name, 16, report_of(draw))
    keys: list[int] = []
    num_placed = 0
    for step in range(400):
        name = draw.choice(names)
        chain = draw.choice(chains)
        match draw.choice(
            ["book", "book", "book", "report", "blocks", "blocks", "computed", "release", "wait", "rare"]
        ):
            case "book":
                prompt_tokens, adapter = 16 * len(chain) + draw.randint(1, 400), draw.choice(["", *ADAPTERS])
                cost = RequestCost(prompt_tokens, draw.randint(1, 300), 1, chain, adapter=adapter)
                excluded = draw.sample(names, draw.choice([0, 0, 1]))
                pair.both("book", step, cost, excluded)
                num_placed += pair.both("receipt", step) is not None
                keys.append(step)
            case "report":
                admitted = tuple(key for key in keys if draw.random() < 0.3)
                pair.both("report", name, report_of(draw, admitted), draw.choice([0.0, 0.5]))
            case "blocks":
                cut = draw.randint(0, len(chain))
                pair.both("blocks_changed", name, chain[:cut], draw.choice([(), chain[cut:]]))
            case "computed" if keys:
                pair.both("computed", draw.choice(keys))
            case "release" if keys:
                pair.both("release", keys.pop(draw.randrange(len(keys))))
            case "wait":
                pair.clock.now_s += draw.choice([0.01, 0.3, 1.0])
                for heard in draw.sample(names, len(names) * 3 // 4):
                    pair.both("heard", heard)
                pair.both("dispatch")
                pair.both("next_dispatch_s")
            case "rare":
                match draw.choice(["add", "remove", "replace", "refuse", "expire"]):
                    case "add":
                        pair.both("add_replica", name, 16, report_of(draw))
                    case "remove":
                        pair.both("remove_replica", name)
                    case "replace":
                        pair.both("blocks_replaced", name, draw.choice([[], chain]))
                    case "refuse" if keys:
                        pair.both("place", draw.choice(keys))
                    case "expire":
                        pair.both("expire")
        pair.both("bookings_at", name)
        for column in ("free_at", "num_sequences", "num_blocks_taken"):
            assert getattr(pair.python._fleet, column) == getattr(pair.native._fleet, column), column
        for adapter in ADAPTERS:
            holders = pair.python._fleet.adapters.holders(adapter)
            assert holders == pair.native._fleet.adapters.holders(adapter)
    assert num_placed > 4
    for balancer in (pair.python, pair.native):
        for key in keys:
            balancer.release(key)
        assert len(balancer._fleet.expected) == 0


@needs_library
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["store", "remove", "drop", "replace"]), st.integers(0, 5), st.sets(st.integers(0, 40))
        )
    )
)
def test_the_index_counts_what_anybody_holds(events: list[tuple[str, int, set[int]]]) -> None:
    fleet, reference = NativeFleet(), PrefixIndex()
    for event, slot, hashes in events:
        for index in (fleet.index, reference):
            if event == "drop":
                index.store(slot, ())
                index.drop(slot)
            else:
                getattr(index, event)(slot, hashes)
        assert len(fleet.index) == len(reference)


@needs_library
def test_a_large_index_finds_what_was_stored_and_nothing_else() -> None:
    fleet = NativeFleet()
    for slot in range(3):
        fleet.add(f"r{slot}", 16, LoadReport(num_blocks=9, num_free_blocks=9), 0.0)
    placer = NativePlacer(CheapestPolicy(), fleet)
    draw = random.Random(0)
    blocks = [draw.randbytes(16) for _ in range(30_000)]
    fleet.index.store(1, blocks)
    fleet.index.remove(1, blocks[::2])
    assert len(fleet.index) == 15_000
    for block in blocks[:300]:
        booking = Booking(0, RequestCost(17, 1, 1, [block]), frozenset(), 0.0, 0.0)
        # Whoever would wait at all is not booked, so that nothing is expected.
        assert not placer.place(booking, 0b111, hold_s=-1.0)
        assert booking.num_cached_blocks == (block in blocks[1:300:2])


@needs_library
def test_the_order_is_a_load_order() -> None:
    fleet = NativeFleet()
    order = fleet.order
    assert isinstance(order, NativeOrder)
    for slot, free_at in ((0, 3.0), (1, 2.0), (2, 1.0), (0, 0.5)):
        order.put(slot, free_at)
    assert (order.first_after(0.0), order.first_after(0.5), order.first_after(2.0)) == (0.5, 1.0, None)
    order.remove(2)
    assert order.first_after(0.5) == 2.0
    assert len(order) == 2


def test_without_its_library_the_balancer_is_pythons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_LIBRARY_PATH", str(tmp_path))
    assert not native.is_available()
    balancer = Balancer()
    assert type(balancer._placing._placer) is Placer
    balancer.add_replica("a", 16, LoadReport(num_blocks=9, num_free_blocks=9))
    assert balancer.book(1, RequestCost(10, 1)).replica_id == "a"


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    native._library.cache_clear()
    monkeypatch.setattr(native, "_ABI_VERSION", 99)
    with pytest.raises(ConfigError, match=r"libquire_balancer.so has ABI version \d+, this package needs 99"):
        native.is_available()
    native._library.cache_clear()
