"""Which replicas have which adapter: as they have told, and as bookings will make it."""

from __future__ import annotations

from collections import Counter


class AdapterResidence:
    """Slots of the fleet by adapter. A booking's adapter counts as there from its placement on: who comes next pays
    nothing for it."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[str, ...]] = {}
        self._holders: dict[str, int] = {}
        self._expected: dict[str, Counter[int]] = {}

    def holders(self, adapter: str) -> int:
        """A bitmap of the slots where an adapter is resident, being loaded, or about to be."""
        found = self._holders.get(adapter, 0)
        for slot in self._expected.get(adapter, ()):
            found |= 1 << slot
        return found

    def tell(self, slot: int, adapters: tuple[str, ...]) -> None:
        """All that a replica has now."""
        before = self._told.get(slot, ())
        if before == adapters:
            return
        self._told[slot] = adapters
        for name in before:
            self._holders[name] &= ~(1 << slot)
            if not self._holders[name]:
                del self._holders[name]
        for name in adapters:
            self._holders[name] = self._holders.get(name, 0) | 1 << slot

    def expect(self, slot: int, adapter: str) -> None:
        """A request for it was booked there; "" is the base."""
        if adapter:
            self._expected.setdefault(adapter, Counter())[slot] += 1

    def stop_expecting(self, slot: int, adapter: str) -> None:
        """What one `expect` said counts no more: the replica has told, or it will not come."""
        if not adapter:
            return
        slots = self._expected[adapter]
        slots[slot] -= 1
        if not slots[slot]:
            del slots[slot]
        if not slots:
            del self._expected[adapter]

    def drop(self, slot: int) -> None:
        """Forget a replica, and what was expected of it."""
        self.tell(slot, ())
        self._told.pop(slot, None)
        for adapter, slots in list(self._expected.items()):
            slots.pop(slot, None)
            if not slots:
                del self._expected[adapter]
