"""Tokens without a model: next-token distributions that are a pure function of the sequence so far."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

from engine.decoding.beam_search import num_candidates
from engine.decoding.random import draws_of
from engine.int32_buffer import Int32Array
from engine.sampling_params import SamplingParams
from engine.scheduling import BeamCandidate, BeamCandidates, SampledToken, SampleRequest, SamplerOutput

_MASK = 0xFFFFFFFF


class NextToken(NamedTuple):
    """The distribution after one sequence: token `(first + rank) % vocab_size` has probability ∝ `ratio ** rank`."""

    first: int
    ratio: float


class SimulatedLanguage:
    """Draws tokens as a model would, from distributions that a checksum of the sequence's tokens picks.

    Equal sequences continue equally, whatever their batch, replica or preemptions; samples of a group differ, since
    draws use the engine's own generator keyed by (seed, sample index, position). How peaked a distribution is differs
    from token to token, as in text: `ratio` is a uniform number to the power `peakedness`. At 3 the beams of a search
    part as a real model's do: over 64 tokens 2, 4 and 6 beams save 29, 41 and 44 % of their blocks, over 256 tokens 40,
    59 and 65 %, where SmolLM2-135M's save 28, 42, 45, 40, 59 and 64 % (`python -m benchmarks.paper.beam_divergence`).

    Temperature, top-k, top-p, min-p, min_tokens, logprobs and beam search act as on a model's logits. Penalties and
    biases do not: they steer what a text says, and these tokens say nothing.

    Args:
        banned_early: ids that are not drawn before `min_tokens`: the model's end-of-sequence ids.
    """

    def __init__(self, vocab_size: int, banned_early: Collection[int] = (), peakedness: float = 3.0) -> None:
        self._vocab_size = vocab_size
        self._banned_early = frozenset(banned_early)
        self._peakedness = peakedness

    def next_token(self, token_ids: Int32Array) -> NextToken:
        """The distribution of the token that follows."""
        bits = _scramble(zlib.crc32(token_ids.data))
        ratio = ((_scramble(bits) + 0.5) / 2**32) ** self._peakedness
        return NextToken(bits % self._vocab_size, ratio)

    def token_id(self, after: NextToken, rank: int) -> int:
        return (after.first + rank) % self._vocab_size

    def logprob(self, after: NextToken, rank: int) -> float:
        """log(ratio ** rank / sum of the ratios' powers over the vocabulary)."""
        return rank * math.log(after.ratio) - self._log_total(after)

    def top(self, after: NextToken, count: int) -> tuple[tuple[int, float], ...]:
        """The `count` most likely tokens with their log-probabilities, most likely first."""
        log_ratio, log_total = math.log(after.ratio), self._log_total(after)
        ranks = range(min(count, self._vocab_size))
        return tuple([((after.first + rank) % self._vocab_size, rank * log_ratio - log_total) for rank in ranks])

    def _log_total(self, after: NextToken) -> float:
        return math.log1p(-(after.ratio**self._vocab_size)) - math.log1p(-after.ratio)

    def sample(self, requests: Sequence[SampleRequest]) -> SamplerOutput:
        """A token for each request that samples, continuations for each search, whose beams are all there."""
        tokens: list[SampledToken] = []
        searches: dict[str, list[SampleRequest]] = {}
        for request, draw in zip(requests, draws_of(requests), strict=True):
            if request.sampling_params.use_beam_search:
                searches.setdefault(request.request_id, []).append(request)
            else:
                tokens.append(self._sample(request, draw))
        beams = [BeamCandidates(request_id, self._continuations(live)) for request_id, live in searches.items()]
        return SamplerOutput(tuple(tokens), tuple(beams))

    def _sample(self, request: SampleRequest, draw: float) -> SampledToken:
        params = request.sampling_params
        after = self.next_token(request.token_ids)
        rank = 0 if params.greedy else _draw_rank(after.ratio, params, self._vocab_size, draw)
        banned = self._banned(request)
        while self.token_id(after, rank) in banned:
            rank += 1
        token_id = self.token_id(after, rank)
        if params.logprobs is None and not params.ranks_at_end:
            return SampledToken(request.seq_id, token_id, math.nan, ())
        logprob = self.logprob(after, rank % self._vocab_size)
        return SampledToken(request.seq_id, token_id, logprob, self.top(after, params.logprobs or 0))

    def _continuations(self, beams: Sequence[SampleRequest]) -> tuple[BeamCandidate, ...]:
        """The most likely ones over all beams of one search."""
        params = beams[0].sampling_params
        count = num_candidates(params, tuple(self._banned_early))
        found: list[BeamCandidate] = []
        for beam in beams:
            after, banned = self.next_token(beam.token_ids), self._banned(beam)
            top = self.top(after, params.logprobs or 0)
            found.extend(
                BeamCandidate(beam.seq_id, token_id, logprob, beam.cumulative_logprob + logprob, top)
                for token_id, logprob in self.top(after, count + len(banned))
                if token_id not in banned
            )
        found.sort(key=lambda candidate: -candidate.cumulative_logprob)
        return tuple(found[:count])

    def _banned(self, request: SampleRequest) -> frozenset[int]:
        """Tokens that may not come yet; none if that would leave none."""
        params = request.sampling_params
        if request.position - request.num_prompt_tokens >= params.min_tokens:
            return frozenset()
        banned = self._banned_early.union(params.stop_token_ids)
        return banned if len(banned) < self._vocab_size else frozenset()


def _draw_rank(ratio: float, params: SamplingParams, vocab_size: int, draw: float) -> int:
    """Inverse of the truncated geometric distribution that temperature and the filters leave."""
    tempered = ratio ** (1.0 / params.temperature)
    if tempered <= 0.0:
        return 0
    kept = float(vocab_size)
    if params.top_k > 0:
        kept = min(kept, params.top_k)
    if tempered >= 1.0:
        return int(draw * kept)  # a temperature so high that all tokens are equally likely
    log_ratio = math.log(tempered)
    if params.min_p > 0.0:
        kept = min(kept, math.floor(math.log(params.min_p) / log_ratio) + 1)
    if params.top_p < 1.0:
        kept = min(kept, max(1, math.ceil(math.log1p(-params.top_p * (1.0 - tempered**kept)) / log_ratio)))
    rank = math.log1p(-draw * (1.0 - tempered**kept)) / log_ratio
    return min(int(rank), int(kept) - 1)


def _scramble(bits: int) -> int:
    """MurmurHash3's 32-bit finaliser: checksums of similar sequences differ in few bits, these in half of them."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & _MASK
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & _MASK
    return bits ^ (bits >> 16)
