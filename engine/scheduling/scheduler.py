"""Continuous batching with first-come-first-served order and all-or-nothing preemption (§4.5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.memory import BlockCopy, KVCache
from engine.scheduling.scheduler_output import SampleRequest, ScheduledSequence, SchedulerOutput
from engine.sequence import Sequence, SequenceGroup, SequenceStatus


@dataclass(slots=True)
class _Step:
    """A SchedulerOutput in the making."""

    budget: int
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)


class Scheduler:
    """Decides each step which tokens are computed. Returns plain data; touches no tensors, clocks, logs or sockets.

    `running` and `waiting` are ordered by arrival, and every running group arrived before every waiting one:
    admission takes the oldest waiting group, preemption the newest running one, whole. So the oldest group always
    runs, and as any single group fits the pool alone, every admitted request ends.
    """

    def __init__(self, config: EngineConfig, kv_cache: KVCache) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, group: SequenceGroup) -> None:
        self.waiting.append(group)

    def release(self, group: SequenceGroup, seq: Sequence) -> None:
        """Free the blocks of a sequence that is about to end; a trunk's go to the sequence that takes its place."""
        heir = next((other for other in group.live_seqs if other is not seq), None)
        if not group.is_forked and heir is not None and self.kv_cache.holds(seq):
            self.kv_cache.hand_over(seq, heir)
        else:
            self.kv_cache.free(seq)

    def remove(self, group: SequenceGroup) -> None:
        """Forget a group whose sequences have all ended and been released."""
        if group in self.running:
            self.running.remove(group)
        else:
            self.waiting.remove(group)

    def schedule(self) -> SchedulerOutput:
        """Fill one token budget: running groups first, oldest first, then waiting ones while blocks and seats last."""
        step = _Step(self.config.max_num_batched_tokens)
        self._schedule_running(step)
        # What was preempted in a step is not re-admitted in it: the blocks it gave up are for those that run.
        if not step.preempted:
            self._admit_waiting(step)
        return SchedulerOutput(tuple(step.scheduled), tuple(step.copies), tuple(step.preempted))

    def _schedule_running(self, step: _Step) -> None:
        position = 0
        while position < len(self.running) and step.budget > 0:
            group = self.running[position]
            writes = self._plan(group, step.budget)
            if not self._make_room(group, writes, step):
                return  # the group was itself the newest and is preempted; none runs behind it
            self._schedule(step, group, writes)
            position += 1

    def _make_room(self, group: SequenceGroup, writes: list[tuple[Sequence, int]], step: _Step) -> bool:
        """Preempt newest groups until `writes` fit. False if `group` had to be preempted itself."""
        needed = self.kv_cache.num_blocks_to_append(writes)
        while needed > self.kv_cache.num_free_blocks:
            victim = self.running.pop()
            self._preempt(victim)
            step.preempted.append(victim.request_id)
            if victim is group:
                return False
            # The victim may have shared blocks with the group, which then need no copy any more.
            needed = self.kv_cache.num_blocks_to_append(writes)
        return True

    def _preempt(self, group: SequenceGroup) -> None:
        """Drop all blocks of a group; its tokens are computed again when it returns (recomputation, §4.5)."""
        for seq in group.live_seqs:
            self.kv_cache.free(seq)
            seq.status = SequenceStatus.WAITING
        group.reset_trunk()
        group.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(group)

    def _admit_waiting(self, step: _Step) -> None:
        admissions = self._admissions()
        while step.budget > 0 and (group := next(admissions, None)) is not None:
            self._schedule(step, group, self._plan(group, step.budget))

    def _admissions(self) -> Iterator[SequenceGroup]:
        """Admit the oldest waiting groups, each as it is asked for, while seats and blocks last."""
        num_running = sum(len(group.live_seqs) for group in self.running)
        while self.waiting:
            group = self.waiting[0]
            num_seqs = len(group.live_seqs)
            if num_running + num_seqs > self.config.max_num_seqs or not self._fits_now(group):
                return  # strictly first come, first served: nobody overtakes
            self.waiting.popleft()
            self._allocate(group)
            self.running.append(group)
            num_running += num_seqs
            yield group

    def _fits_now(self, group: SequenceGroup) -> bool:
        # Alone the pool is all its own, and no group is taken in that a pool of its own would not hold.
        return not self.running or self.kv_cache.can_admit(group)

    def _allocate(self, group: SequenceGroup) -> None:
        num_cached = self.kv_cache.admit(group)
        if group.num_cached_tokens < 0:
            group.num_cached_tokens = num_cached
            self.num_cached_tokens += num_cached
        for seq in group.live_seqs:
            seq.status = SequenceStatus.RUNNING

    def _plan(self, group: SequenceGroup, budget: int) -> list[tuple[Sequence, int]]:
        """Which of the group's sequences advance, and by how many tokens."""
        writes = []
        for seq in group.seqs_to_compute():
            num_new = min(group.compute_target(seq) - seq.num_computed_tokens, budget)
            if num_new > 0:
                writes.append((seq, num_new))
                budget -= num_new
        return writes

    def _schedule(self, step: _Step, group: SequenceGroup, writes: list[tuple[Sequence, int]]) -> None:
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
                )
            )
            step.budget -= num_new

    def _sample_requests(self, group: SequenceGroup, seq: Sequence, end: int) -> tuple[SampleRequest, ...]:
        """Draws from the row that computes `seq`'s token `end - 1`: its own, or the trunk's for all it stands for."""
        if not group.is_forked and end < group.fork_point:
            return ()
        drawers = [seq] if group.is_forked else group.live_seqs
        return tuple(
            SampleRequest(
                seq_id=drawer.seq_id,
                sampling_params=group.sampling_params,
                seed=group.seed,
                sample_index=drawer.index,
                position=end,
                num_prompt_tokens=drawer.num_prompt_tokens,
                token_ids=drawer.token_ids,
            )
            for drawer in drawers
            if drawer.num_tokens == end
        )

    def advance(self, group: SequenceGroup, seq: Sequence, num_new: int) -> None:
        """Note that a step has computed `num_new` more tokens of `seq`; fork the group if its trunk is complete."""
        seq.num_computed_tokens += num_new
        self.kv_cache.cache_full_blocks(seq, group.root_hash)
        if not group.is_forked and seq.num_computed_tokens == group.fork_point:
            for child in group.live_seqs[1:]:
                self.kv_cache.fork(seq, child)
            group.is_forked = True
