"""Which adapters are known, and which of them are resident: loaded on need, least recently used out first."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import NamedTuple

from engine.adapters.adapter_loader import AdapterLoader, Loaded
from engine.adapters.lora_adapter import LoraAdapter
from engine.errors import AdapterUnavailableError, ConfigError

logger = logging.getLogger(__name__)

# The slot of sequences that want the base as it is.
BASE_SLOT = -1


class AdapterLoad(NamedTuple):
    """An adapter that a step's workers put into a slot before they compute; `prepared` is what they have made of it."""

    slot: int
    adapter: LoraAdapter
    prepared: object = None


class AdapterChanges(NamedTuple):
    """What happens to the slots before a step: those to empty first, then those to fill."""

    drops: tuple[int, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()


NO_CHANGES = AdapterChanges()


class AdapterStats(NamedTuple):
    """How adapters come and go.

    Attributes:
        resident: names, those being loaded included, in the order in which they would be evicted.
        resident_bytes: what they take.
        num_free_slots: slots that an adapter could have now, the unused ones' included.
        load_s: seconds that all loads took, beside the steps, waiting for each other included.
        num_failures: loads that failed.
    """

    num_loads: int = 0
    num_evictions: int = 0
    resident: tuple[str, ...] = ()
    resident_bytes: int = 0
    num_free_slots: int = 0
    load_s: float = 0.0
    num_failures: int = 0


NO_ADAPTERS = AdapterStats()


@dataclass(slots=True)
class _Resident:
    """`loading`: until it can be used."""

    slot: int
    num_bytes: int
    loading: Future[Loaded] | None
    num_users: int = 0


class AdapterManager:
    """Gives adapters slots. A request holds its adapter from its first admission to its end, preemptions included: it
    comes back from the host, or is computed again, with the adapter that it began with.

    A request waits while its adapter is loaded, or if it finds no slot; requests behind it that need neither go on
    meanwhile. It cannot wait for ever: as long as one waits for a slot, no adapter of those behind it is loaded, and
    as many of the resident ones as it needs to go take no further requests. If its load fails, it is to end: `failure`.
    A later request has the adapter loaded anew.

    Adapters are registered from any thread; all else is the engine thread's.

    Args:
        num_slots: adapters that may be resident at once; 0 takes none in.
        max_bytes: what they may take together; None is no bound but the slots.
        bytes_of: what an adapter takes while it is resident.
        loader: prepares adapters; by default they need no preparation.
    """

    def __init__(
        self,
        num_slots: int = 0,
        max_bytes: int | None = None,
        bytes_of: Callable[[LoraAdapter], int] = lambda adapter: 4 * adapter.num_elements,
        loader: AdapterLoader | None = None,
    ) -> None:
        self._loader = loader or AdapterLoader(None)
        self._max_bytes = max_bytes
        self._num_slots = num_slots
        self._bytes_of = bytes_of
        self._known: dict[str, tuple[LoraAdapter, int]] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._free_slots = list(range(num_slots))[::-1]
        self._num_bytes = 0
        self._num_loads = 0
        self._num_evictions = 0
        self._load_s = 0.0
        self._num_failures = 0
        self._failures: dict[str, AdapterUnavailableError] = {}  # of this round
        self._drops: dict[int, None] = {}
        self._loads: dict[int, AdapterLoad] = {}
        self._loading: dict[str, _Resident] = {}
        self._in_need = ""  # the first adapter of this round that found no slot
        self._yielding: tuple[str, frozenset[str]] = ("", frozenset())  # who waits, and which make room for it

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @property
    def names(self) -> list[str]:
        """All known adapters, as they were registered."""
        return list(self._known)

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
        if known.source != adapter.source:
            raise ConfigError(
                f"adapter {adapter.name} is known already, from {known.source}; give the one in {adapter.source} "
                "another name"
            )

    def begin_round(self) -> None:
        """Requests are about to be admitted, the oldest first: who finds no slot now goes before those asked for later
        in the same round. What has been loaded meanwhile can be used; what could not be loaded is known by `failure`
        for this round.
        """
        self._in_need = ""
        self._failures.clear()
        for name, resident in list(self._loading.items()):
            self._finish_load(name, resident)

    def acquire(self, name: str) -> int | None:
        """Hold an adapter for one more request; "" is the base.

        Returns:
            Its slot, or None if the request has to wait: it is being loaded from now on, or others have to be released.
        """
        if not name:
            return BASE_SLOT
        if name in self._failures:
            return None
        resident = self._resident.get(name)
        if resident is None:
            resident = self._load(name)
        elif self._in_need and name in self._yielding[1]:
            return None
        if resident is None or resident.loading is not None:
            return None
        resident.num_users += 1
        self._resident.move_to_end(name)
        return resident.slot

    def failure(self, name: str) -> AdapterUnavailableError | None:
        """Why an adapter could not be loaded in this round: those who have waited for it wait in vain."""
        return self._failures.get(name)

    def wait_for_load(self, timeout_s: float) -> None:
        """Wait until an adapter has been loaded; returns at once if none is being loaded."""
        loading = [item.loading for item in self._loading.values() if item.loading is not None]
        if loading:
            wait_for(loading, timeout_s, FIRST_COMPLETED)

    def close(self) -> None:
        """Load no more. Idempotent."""
        self._loader.close()

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
        changes = AdapterChanges(tuple(self._drops), tuple(self._loads.values()))
        self._drops.clear()
        self._loads.clear()
        return changes

    def stats(self) -> AdapterStats:
        if not self._num_slots:
            return NO_ADAPTERS
        num_held = sum(not _is_idle(item) for item in self._resident.values())
        return AdapterStats(
            self._num_loads,
            self._num_evictions,
            tuple(self._resident),
            self._num_bytes,
            self._num_slots - num_held,
            self._load_s,
            self._num_failures,
        )

    def check_invariants(self) -> None:
        """Raise AssertionError if a slot or a byte is lost or counted twice."""
        slots = [item.slot for item in self._resident.values()] + self._free_slots
        assert sorted(slots) == list(range(self._num_slots)), "a slot is lost or given twice"
        assert self._num_bytes == sum(item.num_bytes for item in self._resident.values()), "bytes are miscounted"
        assert self._max_bytes is None or self._num_bytes <= self._max_bytes, "adapters exceed their memory"

    def _load(self, name: str) -> _Resident | None:
        """Give an adapter a slot and load it; None if there is no room, or an older request needs what there is."""
        adapter, num_bytes = self._known[name]
        if self._in_need:
            return None
        if not self._make_room(num_bytes):
            self._in_need = name
            waiting, yielding = self._yielding
            if waiting != name or not yielding <= self._resident.keys():
                # The same ones as long as it waits, or none would ever be released by all.
                self._yielding = name, frozenset(self._first_to_go(num_bytes, list(self._resident)) or ())
            return None
        resident = self._resident[name] = _Resident(self._free_slots.pop(), num_bytes, self._loader.start(adapter))
        self._num_bytes += num_bytes
        self._loading[name] = resident
        self._finish_load(name, resident)
        return self._resident.get(name)

    def _finish_load(self, name: str, resident: _Resident) -> None:
        """Put an adapter into the next step's changes, once it is prepared, or give its slot back."""
        assert resident.loading is not None, f"adapter {name} is not being loaded"
        if not resident.loading.done():
            return
        del self._loading[name]
        error = resident.loading.exception()
        if error is not None:
            self._give_up(name, error)
            return
        prepared, seconds = resident.loading.result()
        resident.loading = None
        self._num_loads += 1
        self._load_s += seconds
        self._loads[resident.slot] = AdapterLoad(resident.slot, self._known[name][0], prepared)

    def _give_up(self, name: str, error: BaseException) -> None:
        """Nobody holds an adapter that is being loaded."""
        self._num_failures += 1
        self._failures[name] = AdapterUnavailableError(f"adapter {name} cannot be loaded: {error}")
        logger.error("adapter %s cannot be loaded; the requests that wait for it fail", name, exc_info=error)
        self._free(name)

    def _make_room(self, num_bytes: int) -> bool:
        """Evict unused adapters, oldest use first, until one of `num_bytes` fits; none if it would not help."""
        evicted = self._first_to_go(num_bytes, [name for name, item in self._resident.items() if _is_idle(item)])
        if evicted is None:
            return False
        for name in evicted:
            slot = self._free(name)
            self._num_evictions += 1
            self._drops[slot] = None
            self._loads.pop(slot, None)
        return True

    def _free(self, name: str) -> int:
        """Take an adapter's slot, which is returned, and its bytes."""
        item = self._resident.pop(name)
        self._free_slots.append(item.slot)
        self._num_bytes -= item.num_bytes
        return item.slot

    def _first_to_go(self, num_bytes: int, names: list[str]) -> list[str] | None:
        """As many of `names` as would make room for so many bytes; None if all of them would not."""
        num_freed, freed = 0, 0
        while not self._fits(num_bytes - freed, num_freed):
            if num_freed == len(names):
                return None
            freed += self._resident[names[num_freed]].num_bytes
            num_freed += 1
        return names[:num_freed]

    def _fits(self, num_more_bytes: int, num_more_slots: int) -> bool:
        has_slot = len(self._free_slots) + num_more_slots > 0
        return has_slot and (self._max_bytes is None or self._num_bytes + num_more_bytes <= self._max_bytes)


def _is_idle(resident: _Resident) -> bool:
    return resident.num_users == 0 and resident.loading is None
