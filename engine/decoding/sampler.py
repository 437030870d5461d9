"""Draws tokens from logits. NumPy on the host; one uniform number a draw, by inverting the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from engine.decoding.penalties import apply_biases_and_penalties
from engine.decoding.random import uniform
from engine.sampling_params import SamplingParams
from engine.scheduling import SampledToken, SampleRequest

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

    def sample(
        self, logits: FloatArray, requests: SequenceOf[SampleRequest], rows: SequenceOf[int]
    ) -> list[SampledToken]:
        """Draw one token for each request.

        Args:
            logits: float32 `[num_rows, vocab_size]`; not changed.
            requests: what to draw; several may share a row.
            rows: `[len(requests)]`, the row of each request.
        """
        draws = uniform(
            np.array([request.seed for request in requests], dtype=np.uint64),
            np.array([request.sample_index for request in requests], dtype=np.uint64),
            np.array([request.position for request in requests], dtype=np.uint64),
        )
        return [
            self._sample_row(logits[row], request, draw)
            for request, row, draw in zip(requests, rows, draws.tolist(), strict=True)
        ]

    def _sample_row(self, logits: FloatArray, request: SampleRequest, draw: float) -> SampledToken:
        params = request.sampling_params
        shaped = apply_biases_and_penalties(logits, request, self._eos_token_ids)
        token_id = int(shaped.argmax()) if params.greedy else _draw(shaped, params, draw)
        if params.logprobs is None:
            return SampledToken(request.seq_id, token_id, float("nan"), ())
        return _with_logprobs(request.seq_id, token_id, logits, params.logprobs)


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


def _with_logprobs(seq_id: int, token_id: int, logits: FloatArray, num_top: int) -> SampledToken:
    shifted = logits.astype(np.float64) - float(logits.max())
    normaliser = float(np.log(np.exp(shifted).sum()))
    top = _most_likely(logits, num_top).tolist() if num_top else []
    return SampledToken(
        seq_id,
        token_id,
        float(shifted[token_id]) - normaliser,
        tuple((token, float(shifted[token]) - normaliser) for token in top),
    )
