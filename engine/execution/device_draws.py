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
from engine.execution.logit_adjustments import adjustments_of
from engine.execution.pinned import PinnedPair, copy_to_device, copy_to_host
from engine.kernels.cuda_abi import CANDIDATE, DRAW, DRAWN, MAX_CANDIDATES, ONE
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.scheduling import BeamCandidate, BeamCandidates, SampledToken, SampleRequest, SamplerOutput

_TOKEN_COLUMN = 2  # of DRAWN, in words of 4 bytes: behind `mass`, which has two
_COLDEST = 1e-30  # temperatures below it are as good as greedy, and their inverse would be no float32


class DeviceDraws:
    """Draws a step's tokens, and puts them where the next step wants them.

    Logits that penalties or biases change are copied and changed on the device first; log-probabilities are those of
    the logits as they came. Searches for more candidates than the device lists take the way over the host; they are
    never scheduled ahead, so nobody misses their tokens here.

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
        # Twice: a draw from changed logits may come with one that reports of the logits as they were.
        self._draws = PinnedPair((2 * max_draws, DRAW.itemsize), torch.uint8, device)
        self._drawn = torch.zeros((2 * max_draws, DRAWN.itemsize), dtype=torch.uint8, device=device)
        # One-dimensional each: a strided copy would go by way of pageable memory, for which the host has to wait.
        self._awaiting_rows = PinnedPair((max_draws,), torch.int64, device)
        self._awaited_draws = PinnedPair((max_draws,), torch.int64, device)
        self._adjusted_rows = PinnedPair((max_draws,), torch.int64, device)
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
        plain, adjusted, others = _Asked([], []), _Asked([], []), _Asked([], [])
        for request, row in zip(requests, rows, strict=True):
            if self._num_candidates(request, logits.shape[1]) > MAX_CANDIDATES:
                others.add(request, row)
            else:
                (adjusted if changes_logits(request) else plain).add(request, row)
        drawn = self._draw_here(logits, plain, adjusted)
        host_logits = None
        if others.requests:
            host_logits = copy_to_host(logits[self._host_rows.next().send(others.rows)])
        return self._pending(drawn, others.requests, host_logits)

    def nothing(self) -> PendingStep:
        """The end of a step that draws nothing, which has to be waited for like any other."""
        self._index_of = {}
        return self._pending(_NOTHING_DRAWN, [], None)

    def _pending(
        self, drawn: _DrawnOnDevice, host_requests: list[SampleRequest], host_logits: torch.Tensor | None
    ) -> PendingStep:
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _PendingDraws(self, event, drawn, host_requests, host_logits)

    def _num_candidates(self, request: SampleRequest, vocab_size: int) -> int:
        params = request.sampling_params
        count = params.logprobs or 0
        if params.use_beam_search:
            count = max(count, num_candidates(params, self._eos_token_ids))
        return min(count, vocab_size)

    def _draw_here(self, logits: torch.Tensor, plain: _Asked, adjusted: _Asked) -> _DrawnOnDevice:
        """Draws from the logits as they are come first, then those from changed ones, then what reports of these as
        they were."""
        requests = plain.requests + adjusted.requests
        changed = self._change(logits, adjusted) if adjusted.requests else None  # what the step before drew is there
        self._index_of = {request.seq_id: index for index, request in enumerate(requests)}
        if not requests:
            return _NOTHING_DRAWN
        reported = [
            index
            for index, request in enumerate(adjusted.requests, start=len(plain.requests))
            if _wants_report(request) and not request.sampling_params.use_beam_search
        ]
        draws = self._draws.next()
        total = len(requests) + len(reported)
        table = draws.host[:total].numpy().view(DRAW)[:, 0]
        _fill(table[: len(requests)], requests, [*plain.rows, *range(len(adjusted.rows))])
        counts = [self._num_candidates(request, logits.shape[1]) for request in requests]
        table["num_candidates"] = [*counts, *(counts[index] for index in reported)]
        if reported:
            reports = table[len(requests) :]
            reports["row"] = [adjusted.rows[index - len(plain.requests)] for index in reported]
            reports["sharpness"], reports["top_p"], reports["min_p"], reports["top_k"] = 0.0, 1.0, 0.0, 0
            reports["wants_normalizer"] = 1
            table["num_candidates"][reported] = table["wants_normalizer"][reported] = 0
        most = int(table["num_candidates"].max())
        shape = (total, most, CANDIDATE.itemsize)
        candidates = torch.empty(shape, dtype=torch.uint8, device=self._device) if most else None
        borders = (0, len(plain.rows), len(requests), total)
        for source, first, end in zip((logits, changed, logits), borders, borders[1:], strict=False):
            if source is not None and first < end:
                part = slice(first, end)
                found = None if candidates is None else candidates[part]
                self._kernels.sample(source, draws.to_device(part), self._drawn[part], found)
        return _DrawnOnDevice(
            requests,
            copy_to_host(self._drawn[:total]),
            None if candidates is None else copy_to_host(candidates),
            reported,
            self._logits_of_drawn(logits, table, reported, len(requests)) if reported else None,
        )

    def _change(self, logits: torch.Tensor, adjusted: _Asked) -> torch.Tensor:
        """Copies of these rows with penalties and biases."""
        changed = logits.index_select(0, self._adjusted_rows.next().send(adjusted.rows)).float()
        tables = adjustments_of(adjusted.requests, self._eos_token_ids, self._index_of)
        rows, adjustments = (copy_to_device(table, self._device) for table in tables)
        self._kernels.adjust_logits(changed, rows, adjustments, self._drawn)
        return changed

    def _logits_of_drawn(
        self, logits: torch.Tensor, table: npt.NDArray[np.void], reported: list[int], first_report: int
    ) -> torch.Tensor:
        """Of the tokens that were drawn from changed logits, those as they were: on their way to the host."""
        places = np.stack((table["row"][first_report:].astype(np.int64), np.array(reported, dtype=np.int64)), axis=1)
        where = copy_to_device(places.reshape(-1), self._device).view(torch.int64).view(-1, 2)
        tokens = self._drawn.view(torch.int32)[where[:, 1], _TOKEN_COLUMN].long()
        return copy_to_host(logits[where[:, 0], tokens].float())

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


class _Asked(NamedTuple):
    """Draws of one kind, and the row of the logits that each draws from."""

    requests: list[SampleRequest]
    rows: list[int]

    def add(self, request: SampleRequest, row: int) -> None:
        self.requests.append(request)
        self.rows.append(row)


def _wants_report(request: SampleRequest) -> bool:
    return request.sampling_params.logprobs is not None or request.sampling_params.ranks_at_end


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
    table["wants_normalizer"] = [_wants_report(request) for request in requests]


class _DrawnOnDevice(NamedTuple):
    """A step's draws on their way to the host.

    Attributes:
        drawn, candidates: uint8 views of DRAWN and CANDIDATE, of each request and then of each report.
        reported: requests whose log-probabilities are in a report of their own, one after another.
        logits: of their tokens, float32.
    """

    requests: list[SampleRequest]
    drawn: torch.Tensor | None
    candidates: torch.Tensor | None
    reported: list[int]
    logits: torch.Tensor | None

    def results(self, eos_token_ids: SequenceOf[int]) -> tuple[tuple[SampledToken, ...], tuple[BeamCandidates, ...]]:
        if self.drawn is None:
            return (), ()
        drawn = self.drawn.numpy().view(DRAWN)[:, 0]
        normalizers = (drawn["largest"] + np.log(np.maximum(drawn["mass"], 1) / ONE)).tolist()
        token_ids, logits = drawn["token_id"].tolist(), drawn["token_logit"].tolist()
        reports = list(range(len(self.requests)))
        for report, index in enumerate(self.reported, start=len(self.requests)):
            assert self.logits is not None
            reports[index], logits[index] = report, float(self.logits[report - len(self.requests)])
        tokens: list[SampledToken] = []
        searches: dict[str, list[BeamCandidate]] = {}
        counts: dict[str, int] = {}
        for index, (request, report) in enumerate(zip(self.requests, reports, strict=True)):
            params = request.sampling_params
            normalizer = normalizers[report]
            if params.use_beam_search:
                counts[request.request_id] = count = num_candidates(params, eos_token_ids)
                found = continuations(
                    request, self._best(report, normalizer, count), self._best(report, normalizer, params.logprobs or 0)
                )
                searches.setdefault(request.request_id, []).extend(found)
            elif not _wants_report(request):
                tokens.append(SampledToken(request.seq_id, token_ids[index], float("nan"), ()))
            else:
                top = self._best(report, normalizer, params.logprobs or 0)
                tokens.append(SampledToken(request.seq_id, token_ids[index], logits[index] - normalizer, top))
        beams = [BeamCandidates(name, most_likely(found, counts[name])) for name, found in searches.items()]
        return tuple(tokens), tuple(beams)

    def _best(self, index: int, normalizer: float, count: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens of one draw, with their log-probabilities."""
        if count == 0 or self.candidates is None:
            return ()
        best = self.candidates[index].numpy().view(CANDIDATE)[:count, 0]
        logprobs = best["logit"].astype(np.float64) - normalizer
        return tuple(zip(best["token_id"].tolist(), logprobs.tolist(), strict=True))


_NOTHING_DRAWN = _DrawnOnDevice([], None, None, [], None)


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
