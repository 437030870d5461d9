"""Continuous batching with first-come-first-served order and all-or-nothing preemption (§4.5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.adapters import NO_CHANGES, AdapterManager
from engine.config import EngineConfig
from engine.errors import AdapterUnavailableError
from engine.memory import BlockCopy, KVCache
from engine.preemption import PreemptionPolicy
from engine.scheduling.scheduler_output import SampleRequest, ScheduledSequence, SchedulerOutput
from engine.sequence import Sequence, SequenceGroup, SequenceStatus


@dataclass(slots=True)
class Step:
    """A SchedulerOutput in the making."""

    budget: int
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    swap_out: list[BlockCopy] = field(default_factory=list)
    swap_in: list[BlockCopy] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    is_short_of_blocks: bool = False


class Scheduler:
    """Decides each step which tokens are computed. Returns plain data; touches no tensors, clocks, logs or sockets.

    `running` is ordered by admission, `waiting` by arrival: admission takes the oldest waiting group that has its
    adapter, preemption the newest running one, whole. So the oldest running group always runs, and as any single group
    fits the pool alone, every admitted request ends. Preempted groups, swapped out or to be recomputed, wait at the
    front: they come back before any new one is admitted.

    With asynchronous scheduling a step is scheduled while the one before it runs. What that one computes counts as
    computed, and what it draws stands in its sequences as placeholders. Its groups keep their blocks until it has been
    collected: none of them is preempted, and what ends meanwhile leaves its blocks later.

    Args:
        policy: says whether swapping a group is cheaper than recomputing it, when its preemption is due.
        adapters: gives groups the slots of their adapters. A group that gets none waits where it stands; those behind
            it that need none, or one that is there, go on. By default there are no adapters.
    """

    def __init__(
        self,
        config: EngineConfig,
        kv_cache: KVCache,
        policy: PreemptionPolicy,
        adapters: AdapterManager | None = None,
    ) -> None:
        self._adapters = adapters or AdapterManager()
        self.config = config
        self.kv_cache = kv_cache
        self._policy = policy
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self._leaving: list[Sequence] = []  # ended while in flight: their blocks are freed when that step is collected
        self.num_swaps = 0
        self.num_recomputations = 0
        self.num_cached_tokens = 0
        self.preempted: list[SequenceGroup] = []  # by the last `schedule`
        # Of the last `schedule`: groups that wait for an adapter which cannot be loaded, to be ended by the engine.
        self.failed: list[tuple[SequenceGroup, AdapterUnavailableError]] = []

    @property
    def num_preemptions(self) -> int:
        return self.num_swaps + self.num_recomputations

    def add(self, group: SequenceGroup) -> None:
        self.waiting.append(group)

    def release(self, group: SequenceGroup, seq: Sequence) -> None:
        """Free the blocks of a sequence that is about to end; a trunk's go to the sequence that takes its place."""
        heir = next((other for other in group.live_seqs if other is not seq), None)
        if not group.is_forked and heir is not None and self.kv_cache.holds(seq):
            self.kv_cache.hand_over(seq, heir)
        elif group.num_steps_in_flight:
            self._leaving.append(seq)
        else:
            self.kv_cache.free(seq)

    def free_leaving(self) -> None:
        """Free what ended while the step that has just been collected was in flight."""
        for seq in self._leaving:
            self.kv_cache.free(seq)
        self._leaving.clear()

    def remove(self, group: SequenceGroup) -> None:
        """Forget a group whose sequences have all ended and been released."""
        if group.adapter_slot is not None:
            self._adapters.release(group.adapter)
        if group in self.running:
            self.running.remove(group)
        else:
            self.waiting.remove(group)

    def schedule(self) -> SchedulerOutput:
        """Fill one token budget: running groups first, oldest first, then waiting ones while blocks and seats last."""
        step = Step(self.config.max_num_batched_tokens)
        self.preempted.clear()
        self.failed.clear()
        self._schedule_running(step)
        # What was preempted in a step is not re-admitted in it: the blocks it gave up are for those that run.
        if not step.is_short_of_blocks:
            self._admit_waiting(step)
        return SchedulerOutput(
            tuple(step.scheduled),
            tuple(step.swap_out),
            tuple(step.swap_in),
            tuple(step.copies),
            # What has been loaded for nobody in this step goes with the next that computes something.
            self._adapters.take_changes() if step.scheduled else NO_CHANGES,
        )

    def _schedule_running(self, step: Step) -> None:
        position = 0
        while position < len(self.running) and step.budget > 0:
            group = self.running[position]
            writes = self._plan(group, step.budget)
            if not self._make_room(group, writes, step):
                return  # the group was itself the newest and is preempted, or the step in flight has what it needs
            self._schedule(step, group, writes)
            position += 1

    def _make_room(self, group: SequenceGroup, writes: list[tuple[Sequence, int]], step: Step) -> bool:
        """Preempt newest groups until `writes` fit.

        Returns:
            False if `group` had to be preempted itself, or must wait until the step in flight is collected.
        """
        needed = self.kv_cache.num_blocks_to_append(writes)
        while needed > self.kv_cache.num_free_blocks:
            step.is_short_of_blocks = True
            if self._leaving or self.running[-1].num_steps_in_flight:
                return False
            victim = self.running.pop()
            self._preempt(victim, step)
            if victim is group:
                return False
            # The victim may have shared blocks with the group, which then need no copy any more.
            needed = self.kv_cache.num_blocks_to_append(writes)
        return True

    def _preempt(self, group: SequenceGroup, step: Step) -> None:
        """Take all blocks of a group: swap them out, or drop them to be computed again (§4.5)."""
        live = group.live_seqs
        swaps = self._policy.prefers_swap(group) and self.kv_cache.can_swap_out(live)
        self._policy.observe_preemption(group, swaps)
        if swaps:
            step.swap_out.extend(self.kv_cache.swap_out(live))
            status = SequenceStatus.SWAPPED
            self.num_swaps += 1
        else:
            for seq in live:
                self.kv_cache.free(seq)
            group.reset_trunk()
            status = SequenceStatus.WAITING
            self.num_recomputations += 1
        for seq in live:
            seq.status = status
        group.num_preemptions += 1
        self.preempted.append(group)
        self.waiting.appendleft(group)

    def _admit_waiting(self, step: Step) -> None:
        admissions = self._admissions(step)
        while step.budget > 0 and (group := next(admissions, None)) is not None:
            writes = self._plan(group, step.budget)
            if self.kv_cache.num_blocks_to_append(writes) > self.kv_cache.num_free_blocks:
                # What has come back from the host needs more to go on; it runs from the next step, and nobody newer
                # is admitted before it does.
                return
            self._schedule(step, group, writes)

    def _admissions(self, step: Step) -> Iterator[SequenceGroup]:
        """Admit the oldest waiting groups, each as it is asked for, while seats and blocks last."""
        num_running = sum(group.num_seats for group in self.running)
        self._adapters.begin_round()
        position = 0
        while position < len(self.waiting):
            group = self.waiting[position]
            if num_running + group.num_seats > self.config.max_num_seqs or not self._fits_now(group):
                return  # first come, first served: for seats and blocks nobody overtakes
            if group.adapter_slot is None:
                group.adapter_slot = self._adapters.acquire(group.adapter)
            if group.adapter_slot is None:
                if (failure := self._adapters.failure(group.adapter)) is not None:
                    self.failed.append((group, failure))
                position += 1  # its adapter is being loaded, or those in use leave no slot
                continue
            del self.waiting[position]
            self._allocate(group, step)
            self.running.append(group)
            num_running += group.num_seats
            yield group

    def _fits_now(self, group: SequenceGroup) -> bool:
        # Alone the pool is all its own, and no group is taken in that a pool of its own would not hold.
        return not (self.running or self._leaving) or self.kv_cache.can_admit(group)

    def _allocate(self, group: SequenceGroup, step: Step) -> None:
        if group.is_swapped:
            copies = self.kv_cache.swap_in(group.live_seqs)
            step.swap_in.extend(copies)
            self._policy.observe_swap_in(group, len(copies))
        else:
            num_cached = self.kv_cache.admit(group)
            if group.num_cached_tokens < 0:
                group.num_cached_tokens = num_cached
                self.num_cached_tokens += num_cached
            else:
                self._policy.observe_recomputation(group, num_cached)
        for seq in group.live_seqs:
            seq.status = SequenceStatus.RUNNING

    def _plan(self, group: SequenceGroup, budget: int) -> list[tuple[Sequence, int]]:
        """Which of the group's sequences advance, and by how many tokens."""
        writes: list[tuple[Sequence, int]] = []
        targets = group.compute_targets()
        if len(targets) > budget and group.beam_search is not None and group.is_caught_up:
            return writes  # beams draw together or not at all
        for seq, target in targets:
            num_new = min(target - seq.num_computed_tokens, budget)
            if num_new > 0:
                writes.append((seq, num_new))
                budget -= num_new
        return writes

    def _schedule(self, step: Step, group: SequenceGroup, writes: list[tuple[Sequence, int]]) -> None:
        slot = group.adapter_slot
        assert slot is not None, "a group is scheduled without its adapter"
        for seq, num_new in writes:
            step.copies.extend(self.kv_cache.append(seq, num_new))
            start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_new
            step.scheduled.append(
                ScheduledSequence(
                    seq_id=seq.seq_id,
                    start=start,
                    token_ids=seq.token_ids[start:end],
                    block_table=self.kv_cache.block_table(seq).blocks,
                    samples=self._sample_requests(group, seq, end),
                    adapter_slot=slot,
                )
            )
            step.budget -= num_new

    def _sample_requests(self, group: SequenceGroup, seq: Sequence, end: int) -> tuple[SampleRequest, ...]:
        """Draws from the row that computes `seq`'s token `end - 1`: its own, or the trunk's for all it stands for."""
        if not group.is_forked and end < group.fork_point:
            return ()
        drawers = [seq] if group.is_forked else group.live_seqs
        requests = [
            SampleRequest(
                seq_id=drawer.seq_id,
                request_id=group.request_id,
                sampling_params=group.sampling_params,
                seed=group.seed,
                sample_index=drawer.index,
                position=end,
                num_prompt_tokens=drawer.num_prompt_tokens,
                token_ids=drawer.token_ids,
                cumulative_logprob=drawer.cumulative_logprob,
            )
            for drawer in drawers
            if drawer.num_tokens == end
        ]
        return tuple(requests)

    def advance(self, group: SequenceGroup, seq: Sequence, num_new: int) -> None:
        """Count `num_new` more tokens of `seq` as computed; fork the group if its trunk is complete."""
        seq.num_computed_tokens += num_new
        self.cache_blocks(group, seq)
        if not group.is_forked and seq.num_computed_tokens == group.fork_point:
            for child in group.live_seqs[1:]:
                self.kv_cache.fork(seq, child)
            group.is_forked = True

    def cache_blocks(self, group: SequenceGroup, seq: Sequence) -> None:
        """Offer full blocks to the prefix cache, as far as all their tokens are known."""
        # Most beams are dropped, and their blocks are worth nothing to anyone else: only the prompt's are cached.
        num_tokens = seq.num_prompt_tokens if group.beam_search is not None else seq.num_known_tokens
        self.kv_cache.cache_full_blocks(seq, group.root_hash, num_tokens)
