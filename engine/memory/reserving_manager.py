"""The KV cache before paging: each sequence in one contiguous run, reserved for its whole life (§3.1, §6.1)."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from engine.config import CacheConfig
from engine.memory.block_copy import BlockCopy
from engine.memory.block_table import BlockTable
from engine.memory.buddy_allocator import BuddyAllocator, run_size
from engine.memory.reservation import ReservationPolicy
from engine.sequence import Sequence, SequenceGroup


@dataclass(slots=True)
class _Holding:
    """What one sequence holds of its group's reservation.

    Attributes:
        run: first block of its run; None until it is computed in one.
        table: the leading blocks of the run, as far as they are in use.
        source, num_to_copy: the run and the number of leading blocks that a forked sequence still has to copy before
            its first write; it takes a run of its own then.
    """

    run: int | None = None
    table: BlockTable = field(default_factory=BlockTable)
    source: int | None = None
    num_to_copy: int = 0


@dataclass(slots=True)
class GroupReservation:
    """The runs of one group: equally long, one for each sequence that it may run at once.

    Attributes:
        num_tokens: slots that each run was reserved for.
        run_blocks: blocks of a run, the power of two that holds `num_tokens`.
        spare: runs that no sequence is in yet.
        keeps_runs: runs of dropped sequences stay for those that fork later (beam search).
    """

    num_tokens: int
    run_blocks: int
    spare: list[int]
    keeps_runs: bool
    holdings: dict[int, _Holding]

    @property
    def num_runs(self) -> int:
        return len(self.spare) + sum(holding.run is not None for holding in self.holdings.values())


class ReservingManager:
    """KVCacheManager's counterpart for the policies that reserve: same block tables, same kernels, nothing shared.

    A group is admitted once every sequence that it may run has a run; from then on it never lacks memory, so nothing
    is preempted. A fork copies: the child takes a run of its own with its first write. Until then the blocks that it
    copies from stay as they are, even when their sequence ends: its run goes to the first child that waits for it.
    """

    def __init__(self, config: CacheConfig, policy: ReservationPolicy) -> None:
        assert not config.enable_prefix_caching, "EngineConfig keeps prefix caching and reservation apart"
        self.config = config
        self.policy = policy
        self._pool = BuddyAllocator(config.num_blocks)
        self._reservations: dict[int, GroupReservation] = {}  # by the seq_id of each of its sequences

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_empty_blocks(self) -> int:
        """All that are free: nothing is cached."""
        return self._pool.num_free

    @property
    def largest_free_run(self) -> int:
        """Blocks in the largest free run."""
        return self._pool.largest_free_run

    def num_unusable_blocks(self, group: SequenceGroup | None) -> int:
        """Free blocks in runs too short for a sequence of `group`, or for the smallest request if that is None."""
        num_tokens = self.policy.num_tokens(1, 1) if group is None else self.reserved_tokens(group)
        return self._pool.num_free - self._pool.num_free_in_runs_of(self.config.blocks_for(num_tokens))

    def block_table(self, seq: Sequence) -> BlockTable:
        return self._holding(seq).table

    def holds(self, seq: Sequence) -> bool:
        reservation = self._reservations.get(seq.seq_id)
        if reservation is None:
            return False
        holding = reservation.holdings[seq.seq_id]
        return holding.run is not None or holding.source is not None

    def reservation(self, group: SequenceGroup) -> GroupReservation:
        """What an admitted group has reserved."""
        return self._reservations[group.live_seqs[0].seq_id]

    def num_filled_slots(self, seq: Sequence) -> int:
        """Slots of the sequence's own run that hold K and V: none before it has copied what it was forked from."""
        return 0 if self._holding(seq).run is None else seq.num_computed_tokens

    def reserved_tokens(self, group: SequenceGroup) -> int:
        """Slots that each sequence of the group reserves."""
        return self.policy.num_tokens(group.seqs[0].num_prompt_tokens, group.sampling_params.max_tokens)

    # Admission

    def can_admit(self, group: SequenceGroup) -> bool:
        """Whether a run for each of the group's sequences is free."""
        num_blocks = self.config.blocks_for(self.reserved_tokens(group))
        return self._pool.can_allocate(num_blocks, group.num_seats)

    def num_cached_tokens(self, group: SequenceGroup) -> int:
        """0: nothing is ever cached."""
        return 0

    def admit(self, group: SequenceGroup) -> int:
        """Reserve the group's runs and give its trunk the first. The caller has checked `can_admit`.

        Returns:
            0: no token is found in a cache.
        """
        num_tokens = self.reserved_tokens(group)
        num_blocks = self.config.blocks_for(num_tokens)
        seqs = group.live_seqs
        reservation = GroupReservation(
            num_tokens=num_tokens,
            run_blocks=run_size(num_blocks),
            spare=[self._pool.allocate(num_blocks) for _ in range(group.num_seats)],
            keeps_runs=group.beam_search is not None,
            holdings={seq.seq_id: _Holding() for seq in seqs},
        )
        for seq in seqs:
            assert seq.seq_id not in self._reservations
            self._reservations[seq.seq_id] = reservation
        trunk = reservation.holdings[seqs[0].seq_id]
        trunk.run = reservation.spare.pop()
        self._extend(trunk, group.fork_point)
        seqs[0].num_computed_tokens = 0
        return 0

    def allocate(self, seq: Sequence, root_hash: bytes, num_tokens: int) -> int:
        """Only groups are admitted here; single sequences hold blocks where prefixes are pinned."""
        raise AssertionError("a reserving manager admits groups")

    # Nothing is ever preempted, so nothing is swapped or pinned.

    num_pinned_blocks = 0
    num_free_swap_blocks = 0

    def pin(self, seq: Sequence) -> None:
        """Refused by EngineConfig: pinned prefixes are for sharing, and nothing is shared here."""
        raise AssertionError("a reserving manager pins nothing")

    def swap_blocks(self, seqs: SequenceOf[Sequence]) -> list[int]:
        """None."""
        return []

    def can_swap_out(self, seqs: SequenceOf[Sequence]) -> bool:
        """Never asked with another answer."""
        return False

    def swap_out(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]:
        """Cannot happen."""
        raise AssertionError("a reserving manager swaps nothing")

    swap_in = swap_out

    def num_exclusive_blocks(self, seqs: SequenceOf[Sequence]) -> int:
        """All blocks that these sequences are in."""
        return sum(len(self.block_table(seq)) for seq in seqs if self.holds(seq))

    def num_blocks_held_by_others(self, seqs: SequenceOf[Sequence], num_blocks: int) -> int:
        """None: nothing is shared."""
        return 0

    # Growth

    def num_blocks_to_append(self, writes: Iterable[tuple[Sequence, int]]) -> int:
        """0: all that a sequence will ever write was reserved at admission."""
        assert all(self.holds(seq) for seq, _ in writes)
        return 0

    def append(self, seq: Sequence, num_new: int) -> list[BlockCopy]:
        """Let the block table cover the next `num_new` tokens.

        Returns:
            The copies that must happen before this step writes: a forked sequence's whole past, with its first write.
        """
        reservation = self._reservations[seq.seq_id]
        holding = reservation.holdings[seq.seq_id]
        copies = []
        if holding.source is not None:
            holding.run = reservation.spare.pop()
            copies = [BlockCopy(holding.source + k, holding.run + k) for k in range(holding.num_to_copy)]
            holding.source = None
        assert seq.num_computed_tokens + num_new <= reservation.num_tokens, "a sequence outgrows its reservation"
        self._extend(holding, seq.num_computed_tokens + num_new)
        return copies

    def cache_full_blocks(self, seq: Sequence, root_hash: bytes, num_tokens: int | None = None) -> None:
        """Nothing to do: no content outlives its sequence."""

    # Forks and release

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` go on from `parent`'s tokens: it copies their blocks with its first write."""
        assert not self.holds(child)
        reservation = self._reservations[parent.seq_id]
        source = reservation.holdings[parent.seq_id].run
        assert source is not None, "fork of a sequence that has not copied its own past yet"
        self._reservations[child.seq_id] = reservation
        num_to_copy = self.config.blocks_for(parent.num_computed_tokens)
        reservation.holdings[child.seq_id] = _Holding(source=source, num_to_copy=num_to_copy)
        child.num_computed_tokens = parent.num_computed_tokens

    def hand_over(self, seq: Sequence, heir: Sequence) -> None:
        """Give a sequence's run to one without any, whose tokens are the same as far as they are computed."""
        assert not self.holds(heir)
        reservation = self._reservations.pop(seq.seq_id)
        reservation.holdings[heir.seq_id] = reservation.holdings.pop(seq.seq_id)
        heir.num_computed_tokens = seq.num_computed_tokens
        self._give_back_surplus(reservation)

    def free(self, seq: Sequence) -> None:
        """Give up a sequence's part of its group's reservation; a no-op if it has none."""
        reservation = self._reservations.pop(seq.seq_id, None)
        if reservation is None:
            return
        run = reservation.holdings.pop(seq.seq_id).run
        if run is not None:
            heir = next((other for other in reservation.holdings.values() if other.source == run), None)
            if heir is None:
                reservation.spare.append(run)
            else:
                heir.run, heir.source = run, None
                self._extend(heir, heir.num_to_copy * self.config.block_size)
        self._give_back_surplus(reservation)

    def reset_prefix_cache(self) -> None:
        """Nothing to do: nothing is cached."""

    def watch_blocks(self) -> None:
        """Nothing to record: nothing is cached."""

    # Internals

    def _holding(self, seq: Sequence) -> _Holding:
        return self._reservations[seq.seq_id].holdings[seq.seq_id]

    def _extend(self, holding: _Holding, num_tokens: int) -> None:
        assert holding.run is not None
        for index in range(len(holding.table), self.config.blocks_for(num_tokens)):
            holding.table.append(holding.run + index)

    def _give_back_surplus(self, reservation: GroupReservation) -> None:
        """Free the runs that no sequence of the group will need any more."""
        holdings = reservation.holdings
        needed = sum(holding.run is None for holding in holdings.values())
        if holdings and reservation.keeps_runs:
            return
        while len(reservation.spare) > needed:
            self._pool.free(reservation.spare.pop())

    def check_invariants(self) -> None:
        """Raise AssertionError unless every run is accounted for exactly once. O(sequences + runs)."""
        self._pool.check_invariants()
        reservations = {id(item): item for item in self._reservations.values()}.values()
        held: list[tuple[int, int]] = []
        for item in reservations:
            assert set(item.holdings) <= self._reservations.keys()
            runs = [*item.spare, *(holding.run for holding in item.holdings.values() if holding.run is not None)]
            held.extend((run, item.run_blocks) for run in runs)
            assert len(item.spare) >= sum(holding.source is not None for holding in item.holdings.values())
            for holding in item.holdings.values():
                assert holding.source is None or holding.source in runs, "what a child copies from has been given away"
                start = holding.run or 0
                assert holding.table.blocks.tolist() == list(range(start, start + len(holding.table)))
                assert len(holding.table) <= self.config.blocks_for(item.num_tokens)
        assert sorted(held) == self._pool.runs(), "a run is lost or held twice"
