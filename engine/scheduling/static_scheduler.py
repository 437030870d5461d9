"""Static batching: FasterTransformer's scheduler, the paper's other baseline (§6.1)."""

from __future__ import annotations

from engine.scheduling.scheduler import Scheduler, Step


class StaticScheduler(Scheduler):
    """Forms a batch of whatever waits when the engine is idle, and the next one when all of it has ended.

    A batch takes the oldest groups up to `max_num_seqs` sequences and what memory holds, like Triton's dynamic
    batching in front of FasterTransformer. It is admitted in one step, though its prompts may take several, as the
    token budget allows. Tokens are given out as they are drawn and a sequence that ends frees its memory; only its
    seat stays empty. A group that is preempted comes back with the next batch.
    """

    def _admit_waiting(self, step: Step) -> None:
        if self.running:
            return
        super()._admit_waiting(step)
        for _ in self._admissions(step):
            pass  # the rest of the batch: beyond this step's budget, computed from the next one on
