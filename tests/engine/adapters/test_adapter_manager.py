from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.adapters import AdapterLoader, AdapterManager, LoraAdapter
from engine.adapters.adapter_loader import Loaded
from engine.errors import AdapterUnavailableError, ConfigError

SIZES = {"a": 10, "b": 20, "c": 30, "d": 10, "e": 25}


def adapter(name: str, folder: str = "") -> LoraAdapter:
    return LoraAdapter(name, folder or name, {}, {})


def make(num_slots: int, max_bytes: int | None = None) -> AdapterManager:
    manager = AdapterManager(num_slots, max_bytes, lambda item: SIZES[item.name])
    for name in SIZES:
        manager.register(adapter(name))
    return manager


def test_the_base_needs_no_slot() -> None:
    manager = AdapterManager()
    assert manager.acquire("") == -1
    manager.release("")
    assert not any(manager.take_changes())


def test_what_was_evicted_before_it_was_loaded_is_never_loaded() -> None:
    manager = make(1)
    assert manager.acquire("a") == 0
    manager.release("a")
    assert manager.acquire("b") == 0
    changes = manager.take_changes()
    assert [load.adapter.name for load in changes.loads] == ["b"]
    assert not any(manager.take_changes())


def test_one_large_adapter_takes_the_place_of_several() -> None:
    manager = make(4, 50)
    for name in ("a", "b", "d"):
        assert manager.acquire(name) is not None
        manager.release(name)
    assert manager.acquire("c") is not None
    assert manager.stats().resident == ("d", "c")
    assert manager.stats().num_evictions == 2
    assert manager.acquire("e") is None
    assert manager.stats().resident == ("d", "c"), "what would not help is not evicted"


def test_registering() -> None:
    with pytest.raises(ConfigError, match="set enable_lora=true"):
        AdapterManager().register(adapter("a"))
    manager = AdapterManager(1, 15, lambda item: SIZES[item.name])
    manager.register(adapter("a"))
    manager.register(adapter("a"))
    with pytest.raises(ConfigError, match="takes 20 bytes, more than adapter_memory=15"):
        manager.register(adapter("b"))
    with pytest.raises(ConfigError, match="adapter a is known already, from a; give the one in elsewhere another name"):
        manager.register(adapter("a", "elsewhere"))
    assert manager.names == ["a"]
    assert "a" in manager


def held(manager: AdapterManager, *names: str) -> None:
    for name in names:
        manager.begin_round()
        assert manager.acquire(name) is not None
    manager.take_changes()


def test_who_finds_no_slot_holds_up_nobody_who_needs_none() -> None:
    manager = make(2)
    held(manager, "a", "b")
    manager.begin_round()
    assert manager.acquire("c") is None
    assert manager.acquire("") == -1
    assert manager.acquire("b") is not None, "it is there, and stays"
    assert manager.acquire("d") is None
    assert manager.stats().num_free_slots == 0


def test_what_has_to_make_room_takes_no_more_requests_so_that_nobody_waits_for_ever() -> None:
    manager = make(2)
    held(manager, "a", "b")
    for _ in range(3):
        manager.begin_round()
        assert manager.acquire("c") is None
        assert manager.acquire("a") is None, "of the two in use its last request came first"
        assert manager.acquire("b") is not None, "so this one is never idle"
    manager.release("a")
    manager.begin_round()
    assert manager.acquire("c") is not None
    assert manager.acquire("b") is not None
    assert manager.stats().resident == ("c", "b")


def test_who_is_behind_takes_no_slot_from_who_waits_for_one() -> None:
    manager = make(3, 45)
    held(manager, "a", "b")
    manager.begin_round()
    assert manager.acquire("c") is None
    assert manager.acquire("d") is None, "it would fit, and c would wait for it too"
    manager.release("b")
    manager.begin_round()
    assert manager.acquire("c") is not None
    assert manager.stats().resident == ("a", "c")


class HeldLoader(AdapterLoader):
    """Loads when the test says so."""

    def __init__(self) -> None:
        super().__init__(None)
        self.futures: dict[str, Future[Loaded]] = {}

    def start(self, adapter: LoraAdapter) -> Future[Loaded]:
        return self.futures.setdefault(adapter.name, Future())


def test_an_adapter_is_used_once_it_is_loaded() -> None:
    loader = HeldLoader()
    manager = AdapterManager(2, None, lambda item: SIZES[item.name], loader)
    for name in SIZES:
        manager.register(adapter(name))
    manager.begin_round()
    assert manager.acquire("a") is None
    assert manager.acquire("") == -1
    assert manager.acquire("b") is None
    assert manager.acquire("c") is None, "what is being loaded for another is not evicted"
    assert manager.stats().resident == ("a", "b")
    assert not any(manager.take_changes())
    loader.futures["b"].set_result(Loaded("b's pages", 2.5))
    manager.begin_round()
    assert manager.acquire("a") is None
    slot = manager.acquire("b")
    assert slot is not None
    changes = manager.take_changes()
    assert [(load.slot, load.adapter.name, load.prepared) for load in changes.loads] == [(slot, "b", "b's pages")]
    stats = manager.stats()
    assert (stats.num_loads, stats.num_free_slots, stats.load_s) == (1, 0, 2.5)
    manager.check_invariants()


def test_what_cannot_be_read_any_more_gives_its_slot_back_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    loader = HeldLoader()
    manager = AdapterManager(1, None, lambda item: SIZES[item.name], loader)
    manager.register(adapter("a"))
    manager.register(adapter("b"))
    assert manager.acquire("a") is None
    assert manager.failure("a") is None
    loader.futures.pop("a").set_exception(OSError("gone"))
    manager.begin_round()
    assert manager.acquire("a") is None
    failure = manager.failure("a")
    assert isinstance(failure, AdapterUnavailableError)
    assert str(failure) == "adapter a cannot be loaded: gone"
    assert "adapter a cannot be loaded" in caplog.text
    assert (manager.stats().resident, manager.stats().num_free_slots, manager.stats().num_failures) == ((), 1, 1)
    manager.check_invariants()
    assert manager.acquire("b") is None, "the slot is another's to have in the same round"
    assert manager.stats().resident == ("b",)
    loader.futures["b"].set_result(Loaded(None, 0.5))
    manager.begin_round()
    assert manager.failure("a") is None
    assert manager.acquire("b") == 0
    manager.release("b")
    assert manager.acquire("a") is None, "whoever asks later has it tried again"
    loader.futures["a"].set_result(Loaded(None, 0.5))
    manager.begin_round()
    assert manager.acquire("a") == 0
    assert [load.adapter.name for load in manager.take_changes().loads] == ["a"]
    assert (manager.stats().num_loads, manager.stats().num_failures) == (2, 1)


def test_a_load_that_fails_at_once() -> None:
    class Failing(AdapterLoader):
        def start(self, _: LoraAdapter) -> Future[Loaded]:
            failed: Future[Loaded] = Future()
            failed.set_exception(OSError("gone"))
            return failed

    manager = AdapterManager(1, None, lambda item: SIZES[item.name], Failing(None))
    manager.register(adapter("a"))
    assert manager.acquire("a") is None
    assert manager.failure("a") is not None
    assert manager.acquire("a") is None
    assert manager.stats().num_failures == 1, "not tried again for each request of a round"
    manager.check_invariants()


def test_waiting_for_a_load() -> None:
    go = threading.Event()
    loader = AdapterLoader(lambda item: go.wait(10) and item.name)
    manager = AdapterManager(1, None, lambda item: SIZES[item.name], loader)
    manager.register(adapter("a"))
    manager.wait_for_load(10)
    assert manager.acquire("a") is None
    manager.wait_for_load(0.01)
    assert manager.acquire("a") is None
    go.set()
    manager.wait_for_load(10)
    manager.begin_round()
    assert manager.acquire("a") == 0
    assert manager.take_changes().loads[0].prepared == "a"
    assert manager.stats().load_s > 0.01
    manager.close()
    manager.close()


class Adapters(RuleBasedStateMachine):
    """Requests that acquire and release adapters, and a device that follows the changes: whatever is held lies in its
    slot, and never is anything in use dropped or written over."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = make(2, 45)
        self.held: list[tuple[str, int]] = []
        self.uses: list[str] = []  # oldest first, as a model of the order
        self.device: dict[int, str] = {}

    @rule(name=st.sampled_from(sorted(SIZES)))
    def acquire(self, name: str) -> None:
        before = set(self.manager.stats().resident)
        self.manager.begin_round()
        slot = self.manager.acquire(name)
        in_use = {used for used, _ in self.held}
        if slot is None:
            assert name not in before
            sizes = sum(SIZES[used] for used in in_use) + SIZES[name]
            assert len(in_use) == 2 or sizes > 45, "there was room once the unused were gone"
            assert set(self.manager.stats().resident) == before
            return
        evicted = before - set(self.manager.stats().resident)
        assert not evicted & in_use
        idle = [used for used in self.uses if used in before and used not in in_use]
        assert evicted == set(idle[: len(evicted)]), "the least recently used go first"
        self.held.append((name, slot))
        self._used(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        name, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.manager.release(name)
        self._used(name)

    @rule()
    def step(self) -> None:
        changes = self.manager.take_changes()
        for slot in changes.drops:
            self.device.pop(slot, None)
        for slot, loaded, _ in changes.loads:
            assert self.device.setdefault(slot, loaded.name) == loaded.name, "a slot is filled that was not emptied"
        assert all(self.device[slot] == name for name, slot in self.held)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_invariants()

    def _used(self, name: str) -> None:
        self.uses = [used for used in self.uses if used != name] + [name]


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
