"""What a step draws, as the array of QuireSample structs that the native decoder fills, and back."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.decoding.beam_search import num_candidates
from engine.decoding.penalties import changes_logits
from engine.decoding.random import uniform
from engine.decoding.sampler import Sampler
from engine.loading.stored_tensor import FloatArray
from engine.scheduling import BeamCandidate, BeamCandidates, SampledToken, SampleRequest, SamplerOutput

SAMPLE = np.dtype(
    [
        ("logits", np.uint64),
        ("candidates", np.uint64),
        ("draw", np.float64),
        ("log_normalizer", np.float64),
        ("row", np.int32),
        ("num_candidates", np.int32),
        ("wants_normalizer", np.int32),
        ("top_k", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("token_id", np.int32),
        ("token_logit", np.float32),
        ("reserved", np.int32),
    ],
    align=True,
)
_CANDIDATE = np.dtype([("logit", np.float32), ("token_id", np.int32)])

# Of what may not be 0, which smaller numbers are once they are float32, or their reciprocals infinite.
_LEAST = 1e-30

_StructArray = npt.NDArray[np.void]


class _Search(NamedTuple):
    """The live beams of one request: indices of their samples, in order."""

    request_id: str
    members: list[int]


class NativeSamples:
    """One step's draws.

    Requests that change their logits (penalties, biases, too short to stop) take them whole and draw in Python; a
    search does so with all its beams.

    Args:
        requests, rows: what to draw, and for each the index of its row of logits.
    """

    def __init__(
        self,
        requests: SequenceOf[SampleRequest],
        rows: SequenceOf[int],
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._requests = requests
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self.samples = np.zeros(len(requests), dtype=SAMPLE)
        self.samples["row"] = rows
        self.samples["top_p"] = 1.0
        self._shaped: list[int] = []
        self._searches: list[_Search] = []
        self._logits: FloatArray | None = None
        self._plain = all(
            request.sampling_params.wants_only_arg_max and not changes_logits(request) for request in requests
        )
        if not self._plain:
            self._ask()

    def results(self, sampler: Sampler) -> SamplerOutput:
        """Read the filled structs."""
        ids = self.samples["token_id"].tolist()
        if self._plain:
            nan = float("nan")
            return SamplerOutput(
                tuple(
                    SampledToken(request.seq_id, token, nan, ())
                    for request, token in zip(self._requests, ids, strict=True)
                )
            )
        tokens: list[SampledToken] = []
        beams = [BeamCandidates(search.request_id, self._continuations(search)) for search in self._searches]
        skipped = {*self._shaped, *(member for search in self._searches for member in search.members)}
        logprobs = (self.samples["token_logit"] - self.samples["log_normalizer"]).tolist()
        for i, (request, token) in enumerate(zip(self._requests, ids, strict=True)):
            if i in skipped:
                continue
            wanted = self.samples["wants_normalizer"][i]
            top = self._top(i, request.sampling_params.logprobs or 0) if wanted else ()
            tokens.append(SampledToken(request.seq_id, token, logprobs[i] if wanted else float("nan"), top))
        if self._logits is not None:
            drawn = sampler.sample(
                self._logits, [self._requests[i] for i in self._shaped], list(range(len(self._shaped)))
            )
            tokens.extend(drawn.tokens)
            beams.extend(drawn.beams)
        return SamplerOutput(tuple(tokens), tuple(beams))

    def _ask(self) -> None:
        """Fill in what each request wants."""
        searches: dict[str, list[int]] = {}
        shaped_searches = set()
        counts = np.zeros(len(self._requests), dtype=np.int64)
        for i, request in enumerate(self._requests):
            params = request.sampling_params
            shaped = changes_logits(request)
            if params.use_beam_search:
                searches.setdefault(request.request_id, []).append(i)
                counts[i] = max(num_candidates(params, self._eos_token_ids), params.logprobs or 0)
                self.samples["wants_normalizer"][i] = 1
                if shaped:
                    shaped_searches.add(request.request_id)
            elif shaped:
                self._shaped.append(i)
            else:
                self._ask_for_token(i, request)
                counts[i] = params.logprobs or 0
        for request_id, members in searches.items():
            if request_id in shaped_searches:
                self._shaped.extend(members)
                counts[members] = 0
            else:
                self._searches.append(_Search(request_id, members))
        self._place_candidates(np.minimum(counts, self._vocab_size))
        self._place_logits()
        draws = uniform(
            np.array([request.seed for request in self._requests], dtype=np.uint64),
            np.array([request.sample_index for request in self._requests], dtype=np.uint64),
            np.array([request.position for request in self._requests], dtype=np.uint64),
        )
        self.samples["draw"] = draws

    def _ask_for_token(self, i: int, request: SampleRequest) -> None:
        params, sample = request.sampling_params, self.samples[i]
        if not params.greedy:
            sample["temperature"] = max(params.temperature, _LEAST)
            sample["top_k"] = min(max(0, params.top_k), self._vocab_size)
            sample["top_p"], sample["min_p"] = max(params.top_p, _LEAST), params.min_p
        sample["wants_normalizer"] = params.logprobs is not None or params.ranks_at_end

    def _place_candidates(self, counts: npt.NDArray[np.int64]) -> None:
        self._offsets = np.cumsum(counts) - counts
        self._candidates = np.zeros(int(counts.sum()), dtype=_CANDIDATE)
        self.samples["num_candidates"] = counts
        self.samples["candidates"] = self._candidates.ctypes.data + self._offsets * _CANDIDATE.itemsize

    def _place_logits(self) -> None:
        if not self._shaped:
            return
        self._logits = np.empty((len(self._shaped), self._vocab_size), dtype=np.float32)
        stride = self._logits.strides[0]
        for row, i in enumerate(self._shaped):
            self.samples["logits"][i] = self._logits.ctypes.data + row * stride

    def _found(self, i: int, count: int) -> _StructArray:
        offset = int(self._offsets[i])
        return self._candidates[offset : offset + count]

    def _top(self, i: int, count: int) -> tuple[tuple[int, float], ...]:
        if count == 0:
            return ()
        found = self._found(i, min(count, self._vocab_size))
        logprobs = found["logit"].astype(np.float64) - self.samples["log_normalizer"][i]
        return tuple(zip(found["token_id"].tolist(), logprobs.tolist(), strict=True))

    def _continuations(self, search: _Search) -> tuple[BeamCandidate, ...]:
        """As Sampler's: the most likely continuations over all beams, equal ones by beam and token id."""
        first = self._requests[search.members[0]].sampling_params
        count = num_candidates(first, self._eos_token_ids)
        of_each = min(self._vocab_size, count)
        found = np.stack([self._found(i, of_each) for i in search.members])
        normalizers = self.samples["log_normalizer"][search.members]
        logprobs = found["logit"].astype(np.float64) - normalizers[:, None]
        before = np.array([self._requests[i].cumulative_logprob for i in search.members])
        cumulative = (before[:, None] + logprobs).reshape(-1)
        best = np.argsort(-cumulative, kind="stable")[:count]
        tops: dict[int, tuple[tuple[int, float], ...]] = {}
        candidates = []
        tokens, flat = found["token_id"].reshape(-1), logprobs.reshape(-1)
        for index in best.tolist():
            member = search.members[index // of_each]
            if member not in tops:
                tops[member] = self._top(member, first.logprobs or 0)
            candidates.append(
                BeamCandidate(
                    self._requests[member].seq_id,
                    int(tokens[index]),
                    float(flat[index]),
                    float(cumulative[index]),
                    tops[member],
                )
            )
        return tuple(candidates)
