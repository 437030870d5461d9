"""What the balancer knows of the replicas, by slot: load, order by load, and what each has cached."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence

from app.balancer.cost import (
    DEFAULT_DECODE_SEQUENCE_S,
    DEFAULT_DECODE_STEP_S,
    DEFAULT_PREFILL_TOKENS_PER_S,
    ReplicaLoad,
    RequestCost,
)
from app.balancer.load_order import LoadOrder
from app.balancer.prefix_index import Overlap, PrefixIndex
from app.transport.messages import LoadReport


class Fleet:
    """Replicas in slots, small numbers that are used again. Not thread-safe: the balancer's lock guards it.

    Times are of the balancer's clock. `free_at` is when a replica will have computed the prompts that it has and those
    booked there; between two reports it needs no update, because it is a time and not an amount.

    Attributes:
        now: set before a decision.
        order: slots by `free_at`.
        index: blocks that replicas have published as stored.
        expected: blocks that prompts booked but not yet computed will store.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.order = LoadOrder()
        self.index = PrefixIndex()
        self.expected = PrefixIndex()
        self.replica_ids: list[str] = []
        self.free_at = array("d")
        self.num_sequences = array("q")
        self.num_blocks_taken = array("q")
        self.running_tokens = array("d")
        self.prefill_rates = array("d")
        self.loads: list[LoadReport] = []
        self.block_sizes: list[int] = []
        self._vacant: list[int] = []
        self._slots: dict[str, int] = {}
        # Means over the replicas that have measured themselves: newcomers are taken to be like the others, or they
        # would be favoured or shunned, and stay as they are.
        self._rates = (0.0, 0.0, 0.0)
        self._rates_stale = True

    def __len__(self) -> int:
        return len(self._slots)

    def slot_of(self, replica_id: str) -> int | None:
        """The slot of a replica, if it is known."""
        return self._slots.get(replica_id)

    def add(self, replica_id: str, block_size: int, load: LoadReport, now: float) -> int:
        """A new replica; its slot."""
        if self._vacant:
            slot = self._vacant.pop()
        else:
            slot = len(self.replica_ids)
            self.replica_ids.append("")
            self.loads.append(load)
            self.block_sizes.append(block_size)
            self.free_at.append(0.0)
            self.num_sequences.append(0)
            self.num_blocks_taken.append(0)
            self.running_tokens.append(0.0)
            self.prefill_rates.append(0.0)
        self._slots[replica_id] = slot
        self.replica_ids[slot] = replica_id
        self.block_sizes[slot] = block_size
        self.set_load(slot, load, now, 0, 0)
        self.index.bit(slot)
        return slot

    def remove(self, replica_id: str) -> None:
        """A replica has gone, and what it had cached with it."""
        slot = self._slots.pop(replica_id)
        self.order.remove(slot)
        self.index.drop(slot)
        self.expected.drop(slot)
        self.replica_ids[slot] = ""
        self.num_sequences[slot] = self.num_blocks_taken[slot] = 0
        self._vacant.append(slot)
        self._rates_stale = True

    def set_load(self, slot: int, load: LoadReport, free_at: float, num_sequences: int, num_blocks: int) -> None:
        """A replica's report, and what bookings that it does not include add to it."""
        self.loads[slot] = load
        self.num_sequences[slot] = load.num_waiting + load.num_running + num_sequences
        self.num_blocks_taken[slot] = num_blocks
        self.running_tokens[slot] = load.num_running_tokens
        self._rates_stale = True
        self.prefill_rates[slot] = self.rates(slot)[0]
        self.set_free_at(slot, free_at)

    def set_free_at(self, slot: int, free_at: float) -> None:
        self.free_at[slot] = free_at
        self.order.put(slot, free_at)

    def rates(self, slot: int) -> tuple[float, float, float]:
        """Prefill tokens a second, seconds of a decode step, and seconds that a sequence adds to it."""
        load = self.loads[slot]
        if load.prefill_tokens_per_s and load.decode_step_s and load.decode_sequence_s:
            return load.prefill_tokens_per_s, load.decode_step_s, load.decode_sequence_s
        if self._rates_stale:
            self._rates_stale = False
            known = [self.loads[slot] for slot in self._slots.values()]
            self._rates = (
                _mean(load.prefill_tokens_per_s for load in known) or DEFAULT_PREFILL_TOKENS_PER_S,
                _mean(load.decode_step_s for load in known) or DEFAULT_DECODE_STEP_S,
                _mean(load.decode_sequence_s for load in known) or DEFAULT_DECODE_SEQUENCE_S,
            )
        prefill, step, sequence = self._rates
        return load.prefill_tokens_per_s or prefill, load.decode_step_s or step, load.decode_sequence_s or sequence

    def load_of(self, slot: int) -> ReplicaLoad:
        """The load as the cost takes it."""
        load = self.loads[slot]
        prefill, step_s, sequence_s = self.rates(slot)
        taken = self.num_blocks_taken[slot]
        return ReplicaLoad(
            max(self.free_at[slot] - self.now, 0.0),
            self.num_sequences[slot],
            max(load.num_free_blocks - taken, 0),
            max(load.num_empty_blocks - taken, 0),
            load.cache_age_s,
            self.block_sizes[slot],
            prefill,
            step_s,
            sequence_s,
        )

    def overlaps(self, request: RequestCost, among: int) -> list[Overlap]:
        """Who of `among` holds how much of the request's chain, deepest first; those without any of it come last."""
        groups = self.index.overlaps(request.block_hashes, among, self.expected)
        rest = among
        for group in groups:
            rest &= ~group.holders
        if rest:
            groups.append(Overlap(0, rest))
        return groups

    def expect(self, slot: int, hashes: Sequence[Hashable]) -> None:
        """A prompt is booked here: those of its blocks that are not here yet will be."""
        self.expected.store(slot, hashes)

    def stop_expecting(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The prompt is computed, or will not be here."""
        self.expected.remove(slot, hashes)


def _mean(rates: Iterable[float]) -> float:
    known = [rate for rate in rates if rate > 0]
    return sum(known) / len(known) if known else 0.0
