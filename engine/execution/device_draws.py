"""Tokens drawn on the device, without a word from the host: what a step in flight draws, the next one goes on from."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.decoding.beam_search import num_candidates
from engine.decoding.penalties import changes_logits
from engine.decoding.sampler import Sampler, continuations, most_likely
from engine.execution.executor import PendingStep
from engine.execution.pinned import PinnedPair, copy_to_host
from engine.kernels.cuda_abi import CANDIDATE, DRAW, DRAWN, MAX_CANDIDATES, ONE
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.scheduling import BeamCandidate, BeamCandidates, SampledToken, SampleRequest, SamplerOutput

_TOKEN_COLUMN = 2  # of DRAWN, in words of 4 bytes: behind `mass`, which has two
_COLDEST = 1e-30  # temperatures below it are as good as greedy, and their inverse would be no float32


class DeviceDraws:
    """Draws a step's tokens, and puts them where the next step wants them.

    Draws whose logits the host has to change first (penalties, biases) take the way over the host; their sequences are
    never scheduled ahead, so nobody misses the tokens here.

    Args:
        max_draws: of one step.
    """

    def __init__(
        self, kernels: CudaOnlyKernels, eos_token_ids: SequenceOf[int], max_draws: int, device: torch.device
    ) -> None:
        self._kernels = kernels
        self._eos_token_ids = tuple(eos_token_ids)
        self._sampler = Sampler(eos_token_ids)
        self._device = device
        self._draws = PinnedPair((max_draws, DRAW.itemsize), torch.uint8, device)
        self._drawn = torch.zeros((max_draws, DRAWN.itemsize), dtype=torch.uint8, device=device)
        # One-dimensional each: a strided copy would go by way of pageable memory, for which the host has to wait.
        self._awaiting_rows = PinnedPair((max_draws,), torch.int64, device)
        self._awaited_draws = PinnedPair((max_draws,), torch.int64, device)
        self._host_rows = PinnedPair((max_draws,), torch.int64, device)
        # Where the latest step's tokens lie in `_drawn`, by sequence.
        self._index_of: dict[int, int] = {}

    def feed(self, token_ids: torch.Tensor, rows: SequenceOf[int], seq_ids: SequenceOf[int]) -> None:
        """Write what the step before drew for each of `seq_ids` into these rows of a step's inputs."""
        if not rows:
            return
        indices = self._awaited_draws.next().send([self._index_of[seq_id] for seq_id in seq_ids])
        drawn = self._drawn.view(torch.int32)[:, _TOKEN_COLUMN]
        token_ids[self._awaiting_rows.next().send(rows)] = drawn[indices].to(token_ids.dtype)

    def draw(self, logits: torch.Tensor, requests: SequenceOf[SampleRequest], rows: SequenceOf[int]) -> PendingStep:
        """Queue a step's draws. `logits`: float32 `[num_rows, vocab_size]`; `rows`: of each request."""
        here = [self._draws_here(request, logits.shape[1]) for request in requests]
        device_requests = [request for request, is_here in zip(requests, here, strict=True) if is_here]
        device_rows = [row for row, is_here in zip(rows, here, strict=True) if is_here]
        pending = self._draw_here(logits, device_requests, device_rows)
        others = [index for index, is_here in enumerate(here) if not is_here]
        host_logits = None
        if others:
            host_logits = copy_to_host(logits[self._host_rows.next().send([rows[index] for index in others])])
        return self._pending(pending, [requests[index] for index in others], host_logits)

    def nothing(self) -> PendingStep:
        """The end of a step that draws nothing, which has to be waited for like any other."""
        self._index_of = {}
        return self._pending(_DrawnOnDevice([], None, None), [], None)

    def _pending(
        self, drawn: _DrawnOnDevice, host_requests: list[SampleRequest], host_logits: torch.Tensor | None
    ) -> PendingStep:
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _PendingDraws(self, event, drawn, host_requests, host_logits)

    def _draws_here(self, request: SampleRequest, vocab_size: int) -> bool:
        return not changes_logits(request) and self._num_candidates(request, vocab_size) <= MAX_CANDIDATES

    def _num_candidates(self, request: SampleRequest, vocab_size: int) -> int:
        params = request.sampling_params
        count = params.logprobs or 0
        if params.use_beam_search:
            count = max(count, num_candidates(params, self._eos_token_ids))
        return min(count, vocab_size)

    def _draw_here(self, logits: torch.Tensor, requests: list[SampleRequest], rows: list[int]) -> _DrawnOnDevice:
        count = len(requests)
        self._index_of = {request.seq_id: index for index, request in enumerate(requests)}
        if count == 0:
            return _DrawnOnDevice([], None, None)
        draws = self._draws.next()
        table = draws.host[:count].numpy().view(DRAW)[:, 0]
        _fill(table, requests, rows)
        table["num_candidates"] = [self._num_candidates(request, logits.shape[1]) for request in requests]
        most = int(table["num_candidates"].max())
        candidates = (
            torch.empty((count, most, CANDIDATE.itemsize), dtype=torch.uint8, device=self._device) if most else None
        )
        drawn = self._drawn[:count]
        self._kernels.sample(logits, draws.to_device(slice(count)), drawn, candidates)
        return _DrawnOnDevice(requests, copy_to_host(drawn), None if candidates is None else copy_to_host(candidates))

    def results(
        self, drawn: _DrawnOnDevice, host_requests: list[SampleRequest], host_logits: torch.Tensor | None
    ) -> SamplerOutput:
        """What a step drew, once its copies to the host have ended."""
        tokens, beams = drawn.results(self._eos_token_ids)
        if host_logits is None:
            return SamplerOutput(tokens, beams)
        rows = range(len(host_requests))
        others = self._sampler.sample(host_logits.float().numpy(), host_requests, rows)
        return SamplerOutput(tokens + others.tokens, beams + others.beams)


def _fill(table: npt.NDArray[np.void], requests: list[SampleRequest], rows: list[int]) -> None:
    """One DRAW for each request, but for its candidates."""
    params = [request.sampling_params for request in requests]
    table["seed"] = [request.seed for request in requests]
    table["sample_index"] = [request.sample_index for request in requests]
    table["position"] = [request.position for request in requests]
    table["row"] = rows
    temperatures = np.array([item.temperature for item in params])
    cold = temperatures < _COLDEST
    table["sharpness"] = np.where(cold, 0.0, 1.0 / np.where(cold, 1.0, temperatures))
    table["top_p"] = [item.top_p for item in params]
    table["min_p"] = [item.min_p for item in params]
    table["top_k"] = [max(0, item.top_k) for item in params]
    table["wants_normalizer"] = [item.logprobs is not None or item.ranks_at_end for item in params]


class _DrawnOnDevice(NamedTuple):
    """A step's draws on their way to the host: uint8 views of DRAWN and CANDIDATE, of each request."""

    requests: list[SampleRequest]
    drawn: torch.Tensor | None
    candidates: torch.Tensor | None

    def results(self, eos_token_ids: SequenceOf[int]) -> tuple[tuple[SampledToken, ...], tuple[BeamCandidates, ...]]:
        if self.drawn is None:
            return (), ()
        drawn = self.drawn.numpy().view(DRAWN)[:, 0]
        normalizers = drawn["largest"] + np.log(np.maximum(drawn["mass"], 1) / ONE)
        tokens: list[SampledToken] = []
        searches: dict[str, list[BeamCandidate]] = {}
        counts: dict[str, int] = {}
        for index, (request, token_id, logit, normalizer) in enumerate(
            zip(
                self.requests,
                drawn["token_id"].tolist(),
                drawn["token_logit"].tolist(),
                normalizers.tolist(),
                strict=True,
            )
        ):
            params = request.sampling_params
            if params.use_beam_search:
                counts[request.request_id] = count = num_candidates(params, eos_token_ids)
                found = continuations(
                    request, self._best(index, normalizer, count), self._best(index, normalizer, params.logprobs or 0)
                )
                searches.setdefault(request.request_id, []).extend(found)
            elif params.logprobs is None and not params.ranks_at_end:
                tokens.append(SampledToken(request.seq_id, token_id, float("nan"), ()))
            else:
                top = self._best(index, normalizer, params.logprobs or 0)
                tokens.append(SampledToken(request.seq_id, token_id, logit - normalizer, top))
        beams = [BeamCandidates(name, most_likely(found, counts[name])) for name, found in searches.items()]
        return tuple(tokens), tuple(beams)

    def _best(self, index: int, normalizer: float, count: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens of one draw, with their log-probabilities."""
        if count == 0 or self.candidates is None:
            return ()
        best = self.candidates[index].numpy().view(CANDIDATE)[:count, 0]
        logprobs = best["logit"].astype(np.float64) - normalizer
        return tuple(zip(best["token_id"].tolist(), logprobs.tolist(), strict=True))


class _PendingDraws(NamedTuple):
    owner: DeviceDraws
    event: torch.cuda.Event | None
    drawn: _DrawnOnDevice
    host_requests: list[SampleRequest]
    host_logits: torch.Tensor | None

    def result(self) -> SamplerOutput:
        if self.event is not None:
            self.event.synchronize()
        return self.owner.results(self.drawn, self.host_requests, self.host_logits)
