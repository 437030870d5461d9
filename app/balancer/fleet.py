"""What the balancer knows of the replicas, by slot: load, order by load, and what each has cached."""

from __future__ import annotations

from array import array
from collections.abc import Container, Hashable, Iterable, Sequence
from heapq import heappush
from typing import Protocol

from app.balancer.adapter_residence import AdapterResidence
from app.balancer.booking import Booking
from app.balancer.cost import (
    DEFAULT_ADAPTER_LOAD_S,
    DEFAULT_DECODE_SEQUENCE_S,
    DEFAULT_DECODE_STEP_S,
    DEFAULT_PREFILL_TOKENS_PER_S,
    ReplicaLoad,
    RequestCost,
)
from app.balancer.load_order import LoadOrder
from app.balancer.prefix_index import Overlap, PrefixIndex, slots_of
from app.balancer.rate_pool import RatePool
from app.transport.messages import LoadReport

# Several heartbeats of a replica.
SILENT_AFTER_S = 2.5
# So that a seat that comes free is taken at once, one request waits on the replica, and one more for so many seats.
_SEATS_A_WAITING = 32


class BlockIndex(Protocol):
    """Which slots hold which blocks: PrefixIndex, or the native one."""

    def __len__(self) -> int:
        """Blocks that anybody holds."""
        ...

    def store(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks now; some it may have held before."""
        ...

    def remove(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks no more; those it did not hold are no error."""
        ...

    def replace(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks and no others."""
        ...

    def drop(self, slot: int) -> None:
        """Forget a replica."""
        ...


class FreeOrder(Protocol):
    """Slots by the time at which they come free: LoadOrder, or the native one."""

    def __len__(self) -> int:
        """Slots in it."""
        ...

    def put(self, slot: int, free_at: float) -> None:
        """Add a slot, or move it."""
        ...

    def remove(self, slot: int) -> None:
        """Take a slot out; it must be in."""
        ...

    def first_after(self, time_s: float) -> float | None:
        """The next time after this at which a slot becomes free."""
        ...


class Fleet:
    """Replicas in slots, small numbers that are used again. Not thread-safe: the balancer's lock guards it.

    Times are of the balancer's clock. `free_at` is when a replica will have computed the prompts that it has and those
    booked there; between two reports it needs no update, because it is a time and not an amount.

    The columns hold what the last report said. Rates are drawn towards the others' by as much as they are uncertain
    (rate_pool.py); a replica that has not measured itself is taken to be like the others.

    Args:
        index, expected, order: other implementations of the attributes of these names.

    Attributes:
        now: set before a decision.
        num_held: requests that the balancer holds back.
        seats: sequences that run at once; 0 while unknown.
        full: bitmap of slots whose seats, or KV blocks, are all taken, and a few requests wait for them.
        watched, moves: whenever one of the former comes to be free at another time, the latter, a heap, gets the time
            and the slot.
        heard_at: when a replica was last heard from.
        silent_after_s: one that has said nothing for longer may be gone: choosing it costs as long as it was silent.
        order: slots by `free_at`.
        index: blocks that replicas have published as stored.
        expected: blocks that prompts booked but not yet computed will store.
        adapters: who has which adapter.
    """

    def __init__(
        self, index: BlockIndex | None = None, expected: BlockIndex | None = None, order: FreeOrder | None = None
    ) -> None:
        self.now = 0.0
        self.num_held = 0
        self.full = 0
        self.seats: list[int] = []
        self.watched: Container[int] = ()
        self.moves: list[tuple[float, int]] = []
        self.silent_after_s = SILENT_AFTER_S
        self.order: FreeOrder = order if order is not None else LoadOrder()
        self.index: BlockIndex = index if index is not None else PrefixIndex()
        self.expected: BlockIndex = expected if expected is not None else PrefixIndex()
        self.adapters = AdapterResidence()
        self.replica_ids: list[str] = []
        self.free_at = array("d")
        self.num_sequences = array("q")
        self.num_blocks_taken = array("q")
        self.running_tokens = array("d")
        self.prefill_rates = array("d")
        self.decode_step_s = array("d")
        self.decode_sequence_s = array("d")
        self.cache_age_s = array("d")
        self.heard_at = array("d")
        self.num_free_blocks = array("q")
        self.num_empty_blocks = array("q")
        self.block_sizes = array("q")
        self.adapter_load_s = array("d")
        self.num_free_adapter_slots = array("q")
        self.loads: list[LoadReport] = []
        self._vacant: list[int] = []
        self._slots: dict[str, int] = {}
        # Newcomers are taken to be like the others, or they would be favoured or shunned, and stay as they are.
        self._prefill_rates = RatePool(DEFAULT_PREFILL_TOKENS_PER_S)
        self._decode_steps = RatePool(DEFAULT_DECODE_STEP_S)
        self._decode_sequences = RatePool(DEFAULT_DECODE_SEQUENCE_S)
        # Of the few that have loaded any.
        self._adapter_loads: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def slot_of(self, replica_id: str) -> int | None:
        """The slot of a replica, if it is known."""
        return self._slots.get(replica_id)

    def slots(self) -> Iterable[int]:
        """The slots that stand for a replica."""
        return self._slots.values()

    def add(self, replica_id: str, block_size: int, load: LoadReport, now: float, seats: int = 0) -> int:
        """A new replica; its slot."""
        if self._vacant:
            slot = self._vacant.pop()
        else:
            slot = len(self.replica_ids)
            self.replica_ids.append("")
            self.loads.append(load)
            self.seats.append(0)
            for column in self.columns():
                column.append(0)
            self._moved()
        self._slots[replica_id] = slot
        self.replica_ids[slot] = replica_id
        self.block_sizes[slot] = block_size
        self.seats[slot] = seats
        self.heard_at[slot] = now
        self.report(slot, load)
        self.set_load(slot, load, now, 0, 0)
        return slot

    def remove(self, replica_id: str) -> None:
        """A replica has gone, and what it had cached with it."""
        slot = self._slots.pop(replica_id)
        self.order.remove(slot)
        self.index.drop(slot)
        self.expected.drop(slot)
        self.adapters.drop(slot)
        self._adapter_loads.pop(slot, None)
        self.replica_ids[slot] = ""
        self.num_sequences[slot] = self.num_blocks_taken[slot] = 0
        self.full &= ~(1 << slot)
        self.free_at[slot] = 0.0
        if slot in self.watched:
            heappush(self.moves, (0.0, slot))
        for pool in (self._prefill_rates, self._decode_steps, self._decode_sequences):
            pool.forget(slot)
        self._vacant.append(slot)

    def report(self, slot: int, load: LoadReport) -> None:
        """What a replica has told: its rates count from now on, the rest with `set_load`."""
        self.loads[slot] = load
        self._prefill_rates.tell(slot, load.prefill_tokens_per_s, load.prefill_error)
        self._decode_steps.tell(slot, load.decode_step_s, 0.0)
        self._decode_sequences.tell(slot, load.decode_sequence_s, load.decode_sequence_error_s)

    def set_load(self, slot: int, load: LoadReport, free_at: float, num_sequences: int, num_blocks: int) -> None:
        """A replica's report, and what bookings that it does not include add to it."""
        self.num_sequences[slot] = load.num_waiting + load.num_running + num_sequences
        self.num_blocks_taken[slot] = num_blocks
        self.running_tokens[slot] = load.num_running_tokens
        self.num_free_blocks[slot], self.num_empty_blocks[slot] = load.num_free_blocks, load.num_empty_blocks
        self.cache_age_s[slot] = load.cache_age_s
        self.num_free_adapter_slots[slot] = load.num_free_adapter_slots
        self.adapters.tell(slot, load.adapters)
        if load.adapter_load_s:
            self._adapter_loads[slot] = load.adapter_load_s
        self.prefill_rates[slot], self.decode_step_s[slot], self.decode_sequence_s[slot] = self.rates(slot)
        self.adapter_load_s[slot] = load.adapter_load_s or _mean(self._adapter_loads.values()) or DEFAULT_ADAPTER_LOAD_S
        self.set_free_at(slot, free_at)
        self.check_full(slot)

    def check_full(self, slot: int) -> None:
        """Set its bit in `full`: its sequences or blocks have changed."""
        num_sequences, seats = self.num_sequences[slot], self.seats[slot]
        has_seat = not seats or num_sequences < seats + 1 + seats // _SEATS_A_WAITING
        has_blocks = not self.loads[slot].num_blocks or self.num_free_blocks[slot] > self.num_blocks_taken[slot]
        if num_sequences and not (has_seat and has_blocks):
            self.full |= 1 << slot
        else:
            self.full &= ~(1 << slot)

    def set_free_at(self, slot: int, free_at: float) -> None:
        self.free_at[slot] = free_at
        self.order.put(slot, free_at)
        self.tell_moved(slot)

    def tell_moved(self, slot: int) -> None:
        """A slot has come to be free at another time: whoever watches it is told."""
        if slot in self.watched:
            heappush(self.moves, (self.free_at[slot], slot))

    def queue_prompt(self, slot: int, prefill_s: float, now: float) -> None:
        """A prompt of so many seconds comes behind those that are there."""
        self.set_free_at(slot, max(self.free_at[slot], now) + prefill_s)

    def take_on(self, booking: Booking) -> None:
        """A booking comes to its slot: blocks that it expects, sequences, blocks taken, and its prompt in the queue."""
        slot, cost = booking.slot, booking.cost
        self.expected.store(slot, cost.block_hashes[booking.num_cached_blocks :])
        self.num_sequences[slot] += cost.num_sequences
        self.num_blocks_taken[slot] += booking.num_new_blocks
        self.queue_prompt(slot, booking.prefill_s, self.now)

    def rates(self, slot: int) -> tuple[float, float, float]:
        """Prefill tokens a second, seconds of a decode step, and seconds that a sequence adds to it."""
        pools = (self._prefill_rates, self._decode_steps, self._decode_sequences)
        prefill, step, sequence = (pool.estimate(slot) for pool in pools)
        return prefill, step, sequence

    def load_of(self, slot: int, adapter: str = "") -> ReplicaLoad:
        """The load as the cost takes it, for a request that wants this adapter."""
        taken = self.num_blocks_taken[slot]
        silence_s = self.now - self.heard_at[slot]
        return ReplicaLoad(
            max(self.free_at[slot] - self.now, 0.0),
            self.num_sequences[slot],
            max(self.num_free_blocks[slot] - taken, 0),
            max(self.num_empty_blocks[slot] - taken, 0),
            self.cache_age_s[slot],
            self.block_sizes[slot],
            self.prefill_rates[slot],
            self.decode_step_s[slot],
            self.decode_sequence_s[slot],
            silence_s if silence_s > self.silent_after_s else 0.0,
            self.adapter_load_s[slot],
            self.num_free_adapter_slots[slot],
            bool(adapter) and not self.adapters.holders(adapter) >> slot & 1,
        )

    def emptiest(self, among: int) -> int:
        """Of a bitmap of slots the one that comes free first."""
        return min(slots_of(among), key=self.free_at.__getitem__)

    def columns(self) -> Sequence[array[float] | array[int]]:
        """The arrays that have an entry a slot."""
        return (
            *(self.free_at, self.prefill_rates, self.decode_step_s, self.decode_sequence_s, self.cache_age_s),
            *(self.heard_at, self.num_sequences, self.num_free_blocks, self.num_empty_blocks, self.num_blocks_taken),
            *(self.block_sizes, self.running_tokens, self.adapter_load_s, self.num_free_adapter_slots),
        )

    def _moved(self) -> None:
        """The arrays have grown, and may lie elsewhere now."""

    def overlaps(self, request: RequestCost, among: int) -> list[Overlap]:
        """Who of `among` holds how much of the request's chain, deepest first; those without any of it come last."""
        assert isinstance(self.index, PrefixIndex)
        assert isinstance(self.expected, PrefixIndex), "policies in Python look into indexes in Python"
        groups = self.index.overlaps(request.block_hashes, among, self.expected)
        rest = among
        for group in groups:
            rest &= ~group.holders
        if rest:
            groups.append(Overlap(0, rest))
        return groups

    def stop_expecting(self, booking: Booking) -> None:
        """The booking's prompt is computed, or will not be at its slot."""
        self.expected.remove(booking.slot, booking.cost.block_hashes[booking.num_cached_blocks :])


def _mean(rates: Iterable[float]) -> float:
    known = [rate for rate in rates if rate > 0]
    return sum(known) / len(known) if known else 0.0
