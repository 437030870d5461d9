"""Tokens drawn on the device, against the sampler on the host: the same draws, and so the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.decoding.sampler import Sampler
from engine.execution.device_draws import DeviceDraws
from engine.kernels.cuda_abi import ADJUSTED_ROW, ADJUSTMENT, CANDIDATE, DRAW, DRAWN
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.kernels.library import KernelError
from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest, SamplerOutput
from engine.sequence import PLACEHOLDER
from tests.gpu.conftest import Kernels

EOS = (3,)


def request(index: int, position: int = 5, **params: Any) -> SampleRequest:
    tokens = np.arange(position, dtype=np.int32)
    name = params.pop("request_id", str(index))
    return SampleRequest(
        index, name, SamplingParams(**params), 77 * index + (index << 40), index % 3, position, 1, tokens, -1.5 * index
    )


def both(
    kernels: Kernels, logits: torch.Tensor, requests: list[SampleRequest], rows: list[int]
) -> tuple[SamplerOutput, SamplerOutput]:
    """What the device draws, and what the host does."""
    only = CudaOnlyKernels(kernels.native.library, kernels.native._stream)
    draws = DeviceDraws(only, EOS, len(requests), torch.device(kernels.device))
    drawn = draws.draw(logits.to(kernels.device), requests, rows).result()
    return drawn, Sampler(EOS).sample(logits.float().numpy(), requests, rows)


def tokens_of(output: SamplerOutput) -> dict[int, int]:
    return {token.seq_id: token.token_id for token in output.tokens}


def make_logits(num_rows: int, vocab_size: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 50.0},
        {"temperature": 1e-3},
        {"temperature": 1e-38},
        {"top_k": 1},
        {"top_k": 7, "temperature": 2.0},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999999, "temperature": 30.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [5, 999])
def test_draws_equal_the_hosts(kernels: Kernels, vocab_size: int, params: dict[str, Any]) -> None:
    logits = make_logits(3, vocab_size)
    requests = [request(index, position=3 + index, **params) for index in range(12)]
    rows = [index % 3 for index in range(12)]
    drawn, expected = both(kernels, logits, requests, rows)
    assert tokens_of(drawn) == tokens_of(expected)


def test_a_large_vocabulary_and_many_seeds(kernels: Kernels) -> None:
    logits = make_logits(2, 49152)
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.95}, {"top_k": 50, "temperature": 0.8}, {"min_p": 0.1}]
    requests = [request(index, **kinds[index % 4]) for index in range(16 if kernels.device == "cpu" else 4000)]
    drawn, expected = both(kernels, logits, requests, [index % 2 for index in range(len(requests))])
    differing = {key for key, token in tokens_of(drawn).items() if tokens_of(expected)[key] != token}
    # A draw that falls within a rounding error of the border between two tokens may go either way.
    assert len(differing) <= len(requests) // 2000, differing


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.5}], ids=str
)
def test_equal_logits_are_ranked_by_id(kernels: Kernels, params: dict[str, Any]) -> None:
    """As bfloat16 logits often are; -0 equals 0, and what cannot come has no logit at all."""
    logits = torch.tensor([[0.0, 1.0, -0.0, 1.0, 1.0, float("-inf"), 1.0, 0.0, -2.0, 1.0]])
    requests = [request(index, **params) for index in range(24)]
    drawn, expected = both(kernels, logits, requests, [0] * 24)
    assert tokens_of(drawn) == tokens_of(expected)
    assert tokens_of(both(kernels, logits, [request(0, temperature=0.0)], [0])[0]) == {0: 1}


def test_log_probabilities_and_the_likeliest_tokens(kernels: Kernels) -> None:
    logits = make_logits(2, 300)
    logits[0, 40:60] = 9.0  # ties around the last candidate
    requests = [request(index, logprobs=index * 5 % 21, temperature=index % 2 * 0.7) for index in range(6)]
    drawn, expected = both(kernels, logits, requests, [0, 1] * 3)
    for one, other in zip(drawn.tokens, expected.tokens, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], rel=1e-5)


def test_the_candidates_of_a_search_are_found_on_the_device(kernels: Kernels) -> None:
    logits = make_logits(4, 500)
    params: dict[str, Any] = {
        "use_beam_search": True,
        "temperature": 0.0,
        "n": 4,
        "request_id": "search",
        "logprobs": 2,
    }
    requests = [request(index, **params) for index in range(4)]
    drawn, expected = both(kernels, logits, requests, list(range(4)))
    (mine,), (theirs,) = drawn.beams, expected.beams
    assert len(mine.candidates) == 8
    assert [(item.seq_id, item.token_id) for item in mine.candidates] == [
        (item.seq_id, item.token_id) for item in theirs.candidates
    ]
    for one, other in zip(mine.candidates, theirs.candidates, strict=True):
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, rel=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


CHANGES: list[dict[str, Any]] = [
    {"logit_bias": {7: 100.0}},
    {},
    {"min_tokens": 16, "stop_token_ids": (8,)},
    {"repetition_penalty": 1.5, "temperature": 0.0},
    {"repetition_penalty": 0.7, "frequency_penalty": 0.3, "presence_penalty": -0.4, "logit_bias": {2: 1.5, 40: -3.0}},
    {"frequency_penalty": 1.1, "min_tokens": 16, "top_p": 0.9},
    {"presence_penalty": 2.0, "top_k": 5},
]


def test_changed_logits_are_drawn_from_on_the_device(kernels: Kernels) -> None:
    logits = make_logits(2, 50)
    logits[:, 3] = 9.0  # EOS, which min_tokens must keep out
    requests = [request(index, 9, **CHANGES[index % len(CHANGES)]) for index in range(70)]
    rows = [index % 2 for index in range(70)]
    drawn, expected = both(kernels, logits, requests, rows)
    assert tokens_of(drawn) == tokens_of(expected)
    assert tokens_of(drawn)[0] == 7


def test_log_probabilities_are_those_of_the_logits_before_they_are_changed(kernels: Kernels) -> None:
    logits = make_logits(3, 80)
    kinds = [{"logprobs": 4}, {"logprobs": 0}, {}, {"best_of": 2}]
    requests = [
        request(index, 9, **kinds[index % 4], **CHANGES[index % len(CHANGES)] | {"temperature": 1.0})
        for index in range(28)
    ]
    drawn, expected = both(kernels, logits, requests, [index % 3 for index in range(28)])
    theirs = {token.seq_id: token for token in expected.tokens}
    assert len(drawn.tokens) == 28
    for token in drawn.tokens:
        other = theirs[token.seq_id]
        assert token.token_id == other.token_id
        assert token.logprob == pytest.approx(other.logprob, rel=1e-5, nan_ok=True)
        assert [item for item, _ in token.top] == [item for item, _ in other.top]
        assert [value for _, value in token.top] == pytest.approx([value for _, value in other.top], rel=1e-5)


def test_a_search_ranks_changed_logits(kernels: Kernels) -> None:
    logits = make_logits(2, 60)
    params: dict[str, Any] = {"use_beam_search": True, "temperature": 0.0, "n": 2, "request_id": "search"}
    requests = [request(index, 9, repetition_penalty=1.4, frequency_penalty=0.5, **params) for index in range(2)]
    drawn, expected = both(kernels, logits, [*requests, request(5)], [0, 1, 1])
    assert tokens_of(drawn) == tokens_of(expected)
    (mine,), (theirs,) = drawn.beams, expected.beams
    assert [(item.seq_id, item.token_id) for item in mine.candidates] == [
        (item.seq_id, item.token_id) for item in theirs.candidates
    ]


@pytest.mark.parametrize("params", [params for params in CHANGES if params], ids=str)
def test_a_token_that_only_the_device_knows_is_penalised(kernels: Kernels, params: dict[str, Any]) -> None:
    """Whether the output had it before or not, and beside draws whose tokens are known."""
    logits = make_logits(4, 45)
    logits[:, :6] += 4.0
    only = CudaOnlyKernels(kernels.native.library, kernels.native._stream)
    draws = DeviceDraws(only, EOS, 40, torch.device(kernels.device))
    before = [request(index) for index in range(40)]
    rows = [index % 4 for index in range(40)]
    first = tokens_of(draws.draw(logits.to(kernels.device), before, rows).result())
    assert len(set(first.values())) > 3, "some of them are among the tokens 0 to 4, some are not"

    after = [request(index, 6, **params) for index in range(0, 40, 2)]
    known = [item._replace(token_ids=np.append(item.token_ids[:5], np.int32(first[item.seq_id]))) for item in after]
    unknown = [
        item._replace(token_ids=np.append(item.token_ids[:5], np.int32(PLACEHOLDER))) if item.seq_id % 4 else known[i]
        for i, item in enumerate(after)
    ]
    drawn = draws.draw(logits.to(kernels.device), unknown, rows[::2]).result()
    assert tokens_of(drawn) == tokens_of(Sampler(EOS).sample(logits.numpy(), known, rows[::2]))


def test_drawn_tokens_are_fed_to_the_next_step(kernels: Kernels) -> None:
    logits = make_logits(3, 100)
    only = CudaOnlyKernels(kernels.native.library, kernels.native._stream)
    draws = DeviceDraws(only, EOS, 8, torch.device(kernels.device))
    requests = [request(index) for index in range(3)]
    drawn = tokens_of(draws.draw(logits.to(kernels.device), requests, [2, 1, 0]).result())
    inputs = torch.full((6,), 99, device=kernels.device)
    draws.feed(inputs, [5, 1], [2, 0])
    assert inputs.tolist() == [99, drawn[0], 99, 99, 99, drawn[2]]


def test_a_sampled_row_does_not_depend_on_the_others(kernels: Kernels) -> None:
    logits = make_logits(4, 400)
    requests = [request(index, top_p=0.9, logprobs=3) for index in range(4)]
    together, _ = both(kernels, logits, requests, list(range(4)))
    for index, token in enumerate(together.tokens):
        alone, _ = both(kernels, logits, [requests[index]], [index])
        assert alone.tokens == (token,)


def test_refuses_tensors_that_do_not_fit(kernels: Kernels) -> None:
    only = CudaOnlyKernels(kernels.native.library, kernels.native._stream)

    def raw(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=kernels.device)

    logits = torch.zeros(2, 10, device=kernels.device)
    draws, drawn = raw(1, DRAW.itemsize), raw(1, DRAWN.itemsize)
    with pytest.raises(KernelError, match="rows of contiguous floats"):
        only.sample(logits.T, draws, drawn, None)
    with pytest.raises(KernelError, match="drawn is"):
        only.sample(logits, draws, raw(2, DRAWN.itemsize), None)
    rows, adjustments = raw(2, ADJUSTED_ROW.itemsize), raw(1, ADJUSTMENT.itemsize)
    with pytest.raises(KernelError, match="contiguous float32 rows"):
        only.adjust_logits(logits.half(), rows, adjustments, drawn)
    with pytest.raises(KernelError, match="rows is"):
        only.adjust_logits(logits, rows[:1], adjustments, drawn)
    with pytest.raises(KernelError, match="max_candidates=11"):
        only.sample(logits, draws, drawn, raw(1, 11, CANDIDATE.itemsize))
