"""The requests that have not ended, and what the tokens that a step drew do to them."""

from __future__ import annotations

from collections.abc import Callable

from engine.memory import KVCache
from engine.outputs import FinishReason, SequenceOutput, TokenLogprobs
from engine.ranking import StopRules, advance_beams, ranked_outputs
from engine.scheduling import BeamCandidates, SampledToken, Scheduler
from engine.sequence import Sequence, SequenceGroup


class LiveRequests:
    """Requests by their ids and sequences by theirs. A sequence that ends leaves at once, and gives back its blocks;
    a request leaves with its last sequence.

    Args:
        clock: seconds, for the timelines of requests that keep one.
    """

    def __init__(
        self, scheduler: Scheduler, kv_cache: KVCache, stop_rules: StopRules, clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._stop_rules = stop_rules
        self._clock = clock
        self._groups: dict[str, SequenceGroup] = {}
        self._seqs: dict[int, tuple[SequenceGroup, Sequence]] = {}
        self.num_output_tokens = 0

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    @property
    def request_ids(self) -> list[str]:
        return list(self._groups)

    def __getitem__(self, request_id: str) -> SequenceGroup:
        return self._groups[request_id]

    def add(self, group: SequenceGroup) -> None:
        """Take a request in whose id is not in use, and queue it."""
        self._groups[group.request_id] = group
        for seq in group.live_seqs:
            self._seqs[seq.seq_id] = (group, seq)
        self._scheduler.add(group)

    def sequence(self, seq_id: int) -> tuple[SequenceGroup, Sequence]:
        """A sequence with its request. KeyError if it has ended; ids are never used again."""
        return self._seqs[seq_id]

    def find(self, seq_id: int) -> tuple[SequenceGroup, Sequence] | None:
        """A sequence with its request, unless it has ended."""
        return self._seqs.get(seq_id)

    def abort(self, request_id: str, index: int | None, reason: FinishReason) -> list[SequenceOutput]:
        """End a request, or one of its sequences; the last output of each that this ended. Unknown ids are no error."""
        group = self._groups.get(request_id)
        if group is None:
            return []
        params = group.sampling_params
        # A ranked request's callers know the n that they asked for, not the sequences it would choose them from.
        ended = [seq for seq in group.live_seqs if index in (None, seq.index) or params.ranks_at_end]
        for seq in ended:
            self._finish(group, seq, reason)
        if group.is_finished:
            self._remove(group)
        indices = range(params.n) if params.ranks_at_end else [seq.index for seq in ended]
        outputs = [SequenceOutput(request_id, index, [], finish_reason=reason) for index in indices]
        if outputs:
            outputs[-1].request_finished = group.is_finished
        return outputs

    def append(self, token: SampledToken) -> list[SequenceOutput]:
        """Add a drawn token to its sequence; one that has ended meanwhile has no use for it.

        Returns:
            What its caller is to get: ranked requests put out all at once, when their last sequence ends.
        """
        found = self._seqs.get(token.seq_id)
        if found is None:
            return []
        group, seq = found
        self.num_output_tokens += 1
        params = group.sampling_params
        has_logprob = params.logprobs is not None or params.ranks_at_end
        end = self._stop_rules.end_of(group, seq, token.token_id)
        seq.append_token(token.token_id, token.logprob if has_logprob else 0.0)
        if end is not None:
            self._finish(group, seq, *end)
            if group.is_finished:
                self._remove(group)
        if params.ranks_at_end:
            seq.logprobs.append(TokenLogprobs(token.logprob, token.top))
            return ranked_outputs(group) if group.is_finished else []
        logprobs = [TokenLogprobs(token.logprob, token.top)] if params.logprobs is not None else None
        return [
            SequenceOutput(
                request_id=group.request_id,
                index=seq.index,
                token_ids=[token.token_id],
                logprobs=logprobs,
                finish_reason=seq.finish_reason,
                stop_token_id=seq.stop_token_id,
                num_cached_tokens=max(0, group.num_cached_tokens),
                request_finished=group.is_finished,
                waited_s=group.waited_s,
            )
        ]

    def search(self, candidates: BeamCandidates) -> list[SequenceOutput]:
        """Advance a beam search: fork beams that go on in several ways, drop those that do not (§4.4).

        Returns:
            The beams that were asked for, if the search is over with this step.
        """
        # By its sequences: a request's id may have been taken again since.
        if candidates.candidates[0].seq_id not in self._seqs:
            return []
        group = self._groups[candidates.request_id]
        step = advance_beams(group, candidates, self._stop_rules)
        if step.is_over:
            for seq in group.live_seqs:
                self._finish(group, seq, "stop")
            self._remove(group)
            return ranked_outputs(group)
        for seq, continuations in step.continuations:
            if not continuations:
                self._finish(group, seq, "abort")
                continue
            beams = [seq, *(self._fork(group, seq) for _ in continuations[1:])]
            for beam, candidate in zip(beams, continuations, strict=True):
                self.num_output_tokens += 1
                beam.append_token(candidate.token_id, 0.0)
                beam.cumulative_logprob = candidate.cumulative_logprob
                beam.logprobs.append(TokenLogprobs(candidate.logprob, candidate.top))
        group.forget_dropped_beams()
        return []

    def _fork(self, group: SequenceGroup, parent: Sequence) -> Sequence:
        child = group.fork(parent)
        self._kv_cache.fork(parent, child)
        self._seqs[child.seq_id] = (group, child)
        return child

    def _finish(
        self, group: SequenceGroup, seq: Sequence, reason: FinishReason, stop_token_id: int | None = None
    ) -> None:
        self._scheduler.release(group, seq)
        group.finish(seq, reason, stop_token_id)
        del self._seqs[seq.seq_id]

    def _remove(self, group: SequenceGroup) -> None:
        self._scheduler.remove(group)
        if group.timeline is not None:
            group.timeline.end(self._clock())
        del self._groups[group.request_id]
