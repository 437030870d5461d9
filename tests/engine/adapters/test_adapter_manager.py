from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.adapters import AdapterManager, LoraAdapter
from engine.errors import ConfigError

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
    assert manager.folder("a") == "a"


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
        for slot, loaded in changes.loads:
            assert self.device.setdefault(slot, loaded.name) == loaded.name, "a slot is filled that was not emptied"
        assert all(self.device[slot] == name for name, slot in self.held)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_invariants()

    def _used(self, name: str) -> None:
        self.uses = [used for used in self.uses if used != name] + [name]


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
