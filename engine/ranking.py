"""Requests whose sequences are ranked before any is returned: beam search, and the best of several samples."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple

from engine.outputs import FinishReason, SequenceOutput, TokenLogprobs
from engine.scheduling import BeamCandidate, BeamCandidates
from engine.sequence import Sequence, SequenceGroup

if TYPE_CHECKING:
    from engine.tokenization import Tokenizer


class BeamStep(NamedTuple):
    """What a step of a search asks for: each live beam's continuations; one without any is dropped."""

    continuations: list[tuple[Sequence, list[BeamCandidate]]]
    is_over: bool


class StopRules:
    """What ends a sequence. Stop strings count here only for ranked requests; the reader of a stream matches its own.

    Args:
        max_model_len: longest sequence in tokens.
        tokenizer: to find stop strings; None leaves them unmatched.
    """

    def __init__(self, eos_token_ids: SequenceOf[int], max_model_len: int, tokenizer: Tokenizer | None) -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer

    def max_output_tokens(self, group: SequenceGroup) -> int:
        room = self._max_model_len - group.seqs[0].num_prompt_tokens
        max_tokens = group.sampling_params.max_tokens
        return room if max_tokens is None else min(room, max_tokens)

    def end_of(self, group: SequenceGroup, seq: Sequence, token_id: int) -> tuple[FinishReason, int | None] | None:
        """(reason, stop token id) if `token_id`, appended to `seq`, would end it, else None."""
        params = group.sampling_params
        num_output = seq.num_output_tokens + 1
        if num_output >= params.min_tokens:
            if token_id in params.stop_token_ids or (not params.ignore_eos and token_id in self.eos_token_ids):
                return "stop", token_id
            matches_here = bool(params.stop) and params.ranks_at_end
            if matches_here and self._has_stop_string(group, [*seq.output_token_ids.tolist(), token_id]):
                return "stop", None
        if num_output >= self.max_output_tokens(group):
            return "length", None
        return None

    def _has_stop_string(self, group: SequenceGroup, output_token_ids: list[int]) -> bool:
        if self._tokenizer is None:
            return False
        params = group.sampling_params
        text = self._tokenizer.decode(output_token_ids, params.skip_special_tokens)
        return any(stop in text for stop in params.stop)


def advance_beams(group: SequenceGroup, drawn: BeamCandidates, rules: StopRules) -> BeamStep:
    """Take a step's candidates into the search: keep what ended, and say how the live beams go on (§4.4)."""
    search = group.beam_search
    assert search is not None
    beams = {seq.seq_id: seq for seq in group.live_seqs}

    def end_of(candidate: BeamCandidate) -> tuple[FinishReason, int | None] | None:
        return rules.end_of(group, beams[candidate.seq_id], candidate.token_id)

    going_on, ending = search.select(drawn.candidates, end_of)
    for candidate, reason, stop_token_id in ending:
        beam = beams[candidate.seq_id]
        token_ids = [*beam.output_token_ids.tolist(), candidate.token_id]
        logprobs = [*beam.logprobs, TokenLogprobs(candidate.logprob, candidate.top)]
        search.add_finished(token_ids, candidate.cumulative_logprob, logprobs, reason, stop_token_id)
    num_generated = group.live_seqs[0].num_output_tokens + 1
    best_running = going_on[0].cumulative_logprob if going_on else None
    is_over = search.is_over(best_running, num_generated, rules.max_output_tokens(group))
    continuations = [(seq, [item for item in going_on if item.seq_id == seq.seq_id]) for seq in beams.values()]
    return BeamStep(continuations, is_over)


def ranked_outputs(group: SequenceGroup) -> list[SequenceOutput]:
    """The `n` best of a request that has ended: beams by their score, samples by log-probability a token."""
    if group.beam_search is not None:
        beams = group.beam_search.finished[: group.sampling_params.n]
        outputs = [
            _output(
                group, index, list(beam.token_ids), beam.logprobs, beam.cumulative_logprob, beam.finish_reason,
                beam.stop_token_id,
            )
            for index, beam in enumerate(beams)
        ]  # fmt: skip
    else:
        best = sorted(group.seqs, key=lambda seq: -seq.cumulative_logprob / max(1, seq.num_output_tokens))
        outputs = [
            _output(
                group, index, seq.output_token_ids.tolist(), seq.logprobs, seq.cumulative_logprob, seq.finish_reason,
                seq.stop_token_id,
            )
            for index, seq in enumerate(best[: group.sampling_params.n])
        ]  # fmt: skip
    outputs[-1].request_finished = True
    return outputs


def _output(
    group: SequenceGroup,
    index: int,
    token_ids: list[int],
    logprobs: SequenceOf[TokenLogprobs],
    cumulative_logprob: float,
    finish_reason: FinishReason | None,
    stop_token_id: int | None,
) -> SequenceOutput:
    return SequenceOutput(
        request_id=group.request_id,
        index=index,
        token_ids=token_ids,
        logprobs=list(logprobs) if group.sampling_params.logprobs is not None else None,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        num_cached_tokens=max(0, group.num_cached_tokens),
        cumulative_logprob=cumulative_logprob,
        waited_s=group.waited_s,
    )
