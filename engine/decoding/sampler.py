"""Draws tokens from logits. NumPy on the host; one uniform number a draw, by inverting the cumulative distribution."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from engine.decoding.beam_search import num_candidates
from engine.decoding.penalties import apply_biases_and_penalties
from engine.decoding.random import draws_of
from engine.sampling_params import SamplingParams
from engine.scheduling import BeamCandidate, BeamCandidates, SampledToken, SampleRequest, SamplerOutput

FloatArray = npt.NDArray[np.float32]

# Top-p without top-k first looks at this many most likely tokens, which nearly always hold the mass; sorting the
# whole vocabulary is the exception.
_CANDIDATES = 1024


class Sampler:
    """Turns each row of logits into drawn tokens.

    Args:
        eos_token_ids: never drawn before `min_tokens`, together with a request's own stop tokens.
    """

    def __init__(self, eos_token_ids: SequenceOf[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: FloatArray, requests: SequenceOf[SampleRequest], rows: SequenceOf[int]) -> SamplerOutput:
        """Draw a token for each request that samples, and find the continuations for those that search.

        Args:
            logits: float32 `[num_rows, vocab_size]`; not changed.
            requests: what to draw; several may share a row. The live beams of a search are all there.
            rows: `[len(requests)]`, the row of each request.
        """
        tokens = []
        searches: dict[str, list[tuple[SampleRequest, FloatArray]]] = {}
        for request, row, draw in zip(requests, rows, draws_of(requests), strict=True):
            if request.sampling_params.use_beam_search:
                searches.setdefault(request.request_id, []).append((request, logits[row]))
            else:
                tokens.append(self._sample_row(logits[row], request, draw))
        beams = [
            BeamCandidates(request_id, self._continuations(live_beams)) for request_id, live_beams in searches.items()
        ]
        return SamplerOutput(tuple(tokens), tuple(beams))

    def _continuations(self, beams: SequenceOf[tuple[SampleRequest, FloatArray]]) -> tuple[BeamCandidate, ...]:
        """The most likely continuations over all beams of one search, equal ones by beam and token id."""
        params = beams[0][0].sampling_params
        count = num_candidates(params, self._eos_token_ids)
        found: list[BeamCandidate] = []
        for request, row in beams:
            shaped = apply_biases_and_penalties(row, request, self._eos_token_ids)
            normaliser = _log_normaliser(shaped)
            # The best of all are among the best of each.
            tokens = _most_likely(shaped, count)
            logprobs = shaped[tokens].astype(np.float64) - normaliser
            top = _top(shaped, normaliser, params.logprobs or 0)
            found += continuations(request, zip(tokens.tolist(), logprobs.tolist(), strict=True), top)
        return most_likely(found, count)

    def _sample_row(self, logits: FloatArray, request: SampleRequest, draw: float) -> SampledToken:
        params = request.sampling_params
        shaped = apply_biases_and_penalties(logits, request, self._eos_token_ids)
        token_id = int(shaped.argmax()) if params.greedy else _draw(shaped, params, draw)
        if params.logprobs is None and not params.ranks_at_end:
            return SampledToken(request.seq_id, token_id, float("nan"), ())
        normaliser = _log_normaliser(logits)
        top = _top(logits, normaliser, params.logprobs or 0)
        return SampledToken(request.seq_id, token_id, float(logits[token_id]) - normaliser, top)


def continuations(
    beam: SampleRequest, tokens: Iterable[tuple[int, float]], top: tuple[tuple[int, float], ...]
) -> list[BeamCandidate]:
    """A beam's continuations by each of `tokens`, with their log-probabilities."""
    return [
        BeamCandidate(beam.seq_id, token, logprob, beam.cumulative_logprob + logprob, top) for token, logprob in tokens
    ]


def most_likely(candidates: list[BeamCandidate], count: int) -> tuple[BeamCandidate, ...]:
    """The `count` best of a search, equal ones in the order that they came in."""
    return tuple(sorted(candidates, key=lambda candidate: -candidate.cumulative_logprob)[:count])


def _draw(logits: FloatArray, params: SamplingParams, draw: float) -> int:
    """Temperature first, then top-k, top-p and min-p, each on what the one before left; ties by token id."""
    tokens, probabilities = _candidates(logits, params)
    if params.min_p > 0.0:
        keep = probabilities >= params.min_p * probabilities.max()
        tokens, probabilities = tokens[keep], probabilities[keep]
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(tokens[min(index, len(tokens) - 1)])


def _candidates(logits: FloatArray, params: SamplingParams) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Tokens left by top-k and top-p with their probabilities, unnormalised; most likely first unless all are left."""
    vocab_size = len(logits)
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    if top_k == vocab_size and params.top_p == 1.0:
        return np.arange(vocab_size), _exponentials(logits, params.temperature, logits.max())
    # The mass that top-p counts is relative to what top-k left, or to the whole vocabulary.
    count = min(top_k, _CANDIDATES) if params.top_p < 1.0 else top_k
    while True:
        tokens = _most_likely(logits, count)
        probabilities = _exponentials(logits[tokens], params.temperature, logits[tokens[0]])
        if params.top_p == 1.0:
            return tokens, probabilities
        if top_k == vocab_size:
            total = _exponentials(logits, params.temperature, logits[tokens[0]]).sum()
        elif count < top_k:
            total = _exponentials(logits[_most_likely(logits, top_k)], params.temperature, logits[tokens[0]]).sum()
        else:
            total = probabilities.sum()
        # Keep a token if the mass before it is below top_p: the smallest set that reaches it.
        cumulative = np.cumsum(probabilities)
        if cumulative[-1] >= params.top_p * total or count == top_k:
            kept = 1 + int(np.searchsorted(cumulative[:-1], params.top_p * total, side="left"))
            return tokens[:kept], probabilities[:kept]
        count = top_k


def _most_likely(logits: FloatArray, count: int) -> npt.NDArray[np.intp]:
    """Ids of the `count` largest logits, largest first, equal ones by id."""
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    above = np.flatnonzero(logits > threshold)
    equal = np.flatnonzero(logits == threshold)[: count - len(above)]
    tokens = np.concatenate([above, equal])
    return tokens[np.lexsort((tokens, -logits[tokens]))]


def _exponentials(logits: FloatArray, temperature: float, largest: np.float32) -> npt.NDArray[np.float64]:
    return np.exp((logits.astype(np.float64) - float(largest)) / temperature)


def _log_normaliser(logits: FloatArray) -> float:
    """log Σ exp(logits), summed in float64."""
    largest = float(logits.max())
    return largest + float(np.log(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))


def _top(logits: FloatArray, normaliser: float, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens with their log-probabilities."""
    if count == 0:
        return ()
    tokens = _most_likely(logits, count)
    return tuple(zip(tokens.tolist(), (logits[tokens].astype(np.float64) - normaliser).tolist(), strict=True))
