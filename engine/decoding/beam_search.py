"""Beam search: which continuations live on, which are done, and when to stop (§4.4).

Scores as in transformers' `generate`: a finished beam's is its cumulative log-probability divided by the number of
generated tokens, end-of-sequence included, to the power of `length_penalty`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.outputs import FinishReason, TokenLogprobs
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.scheduling import BeamCandidate

# Whether a continuation ends its beam, and why: (reason, stop token id or None), or None to go on.
EndOf = Callable[["BeamCandidate"], "tuple[FinishReason, int | None] | None"]


def num_candidates(params: SamplingParams, eos_token_ids: Sequence[int]) -> int:
    """Continuations to look at, so that `width` go on even if every beam's best tokens end it."""
    end_tokens = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    return max(2, 1 + len(end_tokens)) * params.width


@dataclass(frozen=True, slots=True)
class FinishedBeam:
    """A completed sequence: its output tokens, and its score."""

    score: float
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_token_id: int | None


class BeamSearch:
    """One request's search: the best finished beams, and the rules of going on. Live beams are the group's sequences.

    `finished` is sorted by score, best first, and holds at most `width` beams.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.width = params.width
        self.finished: list[FinishedBeam] = []
        self._length_penalty = params.length_penalty
        self._early_stopping = params.early_stopping

    def select(
        self, candidates: Sequence[BeamCandidate], end_of: EndOf
    ) -> tuple[list[BeamCandidate], list[tuple[BeamCandidate, FinishReason, int | None]]]:
        """Split a step's candidates, most likely first.

        Returns:
            The `width` best that go on, and those among the best `width` of all that end: a worse ending is dropped,
            for more than `width` better continuations are known.
        """
        going_on: list[BeamCandidate] = []
        ending: list[tuple[BeamCandidate, FinishReason, int | None]] = []
        for rank, candidate in enumerate(candidates):
            end = end_of(candidate)
            if end is None:
                going_on.append(candidate)
            elif rank < self.width:
                ending.append((candidate, *end))
        return going_on[: self.width], ending

    def add_finished(
        self,
        token_ids: Sequence[int],
        cumulative_logprob: float,
        logprobs: Sequence[TokenLogprobs],
        finish_reason: FinishReason,
        stop_token_id: int | None,
    ) -> None:
        """Keep a completed sequence if it is among the `width` best."""
        score = self._score(cumulative_logprob, len(token_ids))
        beam = FinishedBeam(score, tuple(token_ids), cumulative_logprob, tuple(logprobs), finish_reason, stop_token_id)
        bisect.insort_right(self.finished, beam, key=lambda item: -item.score)
        del self.finished[self.width :]

    def is_over(self, best_running: float | None, num_generated: int, max_generated: int) -> bool:
        """Whether to stop.

        Args:
            best_running: cumulative log-probability of the best live beam, or None if none is left.
            num_generated: tokens that each live beam has generated; `max_generated`: that it may.
        """
        if best_running is None:
            return True
        if len(self.finished) < self.width:
            return False
        if self._early_stopping is True:
            return True
        patient = self._early_stopping == "never" and self._length_penalty > 0.0
        length = max_generated if patient else num_generated
        return self._score(best_running, length) <= self.finished[-1].score

    def _score(self, cumulative_logprob: float, num_generated: int) -> float:
        return float(cumulative_logprob / num_generated**self._length_penalty)
