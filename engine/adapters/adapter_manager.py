"""Which adapters are known, and which of them are resident: loaded on need, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine.adapters.lora_adapter import LoraAdapter
from engine.errors import ConfigError

# The slot of sequences that want the base as it is.
BASE_SLOT = -1


class AdapterLoad(NamedTuple):
    """An adapter that a step's workers put into a slot before they compute."""

    slot: int
    adapter: LoraAdapter


class AdapterChanges(NamedTuple):
    """What happens to the slots before a step: those to empty first, then those to fill."""

    drops: tuple[int, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()


NO_CHANGES = AdapterChanges()


class AdapterStats(NamedTuple):
    """`resident` names are in the order in which they would be evicted; `resident_bytes` are what they take."""

    num_loads: int
    num_evictions: int
    resident: tuple[str, ...]
    resident_bytes: int


@dataclass(slots=True)
class _Resident:
    slot: int
    num_bytes: int
    num_users: int = 0


class AdapterManager:
    """Gives adapters slots. A request holds its adapter from its first admission to its end, preemptions included: it
    comes back from the host, or is computed again, with the adapter that it began with.

    A request whose adapter finds no slot waits. It cannot wait for ever: those who hold the slots were admitted before
    it, and the preempted ones among them come back before anyone new is admitted.

    Adapters are registered from any thread; all else is the engine thread's.

    Args:
        num_slots: adapters that may be resident at once; 0 takes none in.
        max_bytes: what they may take together; None is no bound but the slots.
        bytes_of: what an adapter takes while it is resident.
    """

    def __init__(
        self,
        num_slots: int = 0,
        max_bytes: int | None = None,
        bytes_of: Callable[[LoraAdapter], int] = lambda adapter: 4 * adapter.num_elements,
    ) -> None:
        self._max_bytes = max_bytes
        self._num_slots = num_slots
        self._bytes_of = bytes_of
        self._known: dict[str, tuple[LoraAdapter, int]] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._free_slots = list(range(num_slots))[::-1]
        self._num_bytes = 0
        self._num_loads = 0
        self._num_evictions = 0
        self._drops: dict[int, None] = {}
        self._loads: dict[int, LoraAdapter] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @property
    def names(self) -> list[str]:
        """All known adapters, as they were registered."""
        return list(self._known)

    def folder(self, name: str) -> str:
        """Where a known adapter was read."""
        return self._known[name][0].folder

    def register(self, adapter: LoraAdapter) -> None:
        """Make an adapter known. It is loaded when a request wants it.

        Raises:
            ConfigError: it could never be resident, or another has its name: cached blocks are known by that name.
        """
        num_bytes = self._bytes_of(adapter)
        if self._num_slots == 0:
            raise ConfigError(f"adapter {adapter.name}: this engine takes no adapters; set enable_lora=true")
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            raise ConfigError(
                f"adapter {adapter.name} takes {num_bytes} bytes, more than adapter_memory={self._max_bytes}"
            )
        known, _ = self._known.setdefault(adapter.name, (adapter, num_bytes))
        if known.folder != adapter.folder:
            raise ConfigError(
                f"adapter {adapter.name} is known already, from {known.folder}; give the one in {adapter.folder} "
                "another name"
            )

    def acquire(self, name: str) -> int | None:
        """Hold an adapter for one more request; "" is the base.

        Returns:
            Its slot, or None if it can be made resident only when others have been released.
        """
        if not name:
            return BASE_SLOT
        resident = self._resident.get(name)
        if resident is None:
            adapter, num_bytes = self._known[name]
            if not self._make_room(num_bytes):
                return None
            resident = self._resident[name] = _Resident(self._free_slots.pop(), num_bytes)
            self._num_bytes += num_bytes
            self._num_loads += 1
            self._loads[resident.slot] = adapter
        resident.num_users += 1
        self._resident.move_to_end(name)
        return resident.slot

    def release(self, name: str) -> None:
        """A request that had acquired it has ended."""
        if not name:
            return
        resident = self._resident[name]
        assert resident.num_users > 0, f"adapter {name} is released more often than acquired"
        resident.num_users -= 1
        self._resident.move_to_end(name)

    def take_changes(self) -> AdapterChanges:
        """What the workers have to do since the last call, with the step that is scheduled now."""
        if not (self._drops or self._loads):
            return NO_CHANGES
        changes = AdapterChanges(
            tuple(self._drops), tuple(AdapterLoad(slot, adapter) for slot, adapter in self._loads.items())
        )
        self._drops.clear()
        self._loads.clear()
        return changes

    def stats(self) -> AdapterStats:
        return AdapterStats(self._num_loads, self._num_evictions, tuple(self._resident), self._num_bytes)

    def check_invariants(self) -> None:
        """Raise AssertionError if a slot or a byte is lost or counted twice."""
        slots = [item.slot for item in self._resident.values()] + self._free_slots
        assert sorted(slots) == list(range(self._num_slots)), "a slot is lost or given twice"
        assert self._num_bytes == sum(item.num_bytes for item in self._resident.values()), "bytes are miscounted"
        assert self._max_bytes is None or self._num_bytes <= self._max_bytes, "adapters exceed their memory"

    def _make_room(self, num_bytes: int) -> bool:
        """Evict unused adapters, oldest use first, until one of `num_bytes` fits; none if it would not help."""
        idle = [(name, item) for name, item in self._resident.items() if item.num_users == 0]
        num_evicted, freed = 0, 0
        while not self._fits(num_bytes - freed, num_evicted):
            if num_evicted == len(idle):
                return False
            freed += idle[num_evicted][1].num_bytes
            num_evicted += 1
        for name, item in idle[:num_evicted]:
            del self._resident[name]
            self._free_slots.append(item.slot)
            self._num_bytes -= item.num_bytes
            self._num_evictions += 1
            self._drops[item.slot] = None
            self._loads.pop(item.slot, None)
        return True

    def _fits(self, num_more_bytes: int, num_more_slots: int) -> bool:
        has_slot = len(self._free_slots) + num_more_slots > 0
        return has_slot and (self._max_bytes is None or self._num_bytes + num_more_bytes <= self._max_bytes)
