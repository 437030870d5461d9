"""What a request is taken to cost, with and without hashes, and when another replica has begun it."""

from __future__ import annotations

from app.ingress.prompt_chain import prompt_chain
from app.ingress.request_cost import request_cost
from engine.request import EngineRequest, ResumedSequence
from engine.sampling_params import SamplingParams


def make_request(max_tokens: int | None, resumed: tuple[ResumedSequence, ...] = (), n: int = 1) -> EngineRequest:
    return EngineRequest("r", list(range(40)), SamplingParams(max_tokens=max_tokens, n=n), resumed=resumed)


def test_output_is_as_long_as_is_usual_unless_the_request_bounds_it() -> None:
    assert request_cost(make_request(None), 128, None).output_tokens == 128
    assert request_cost(make_request(9), 128, None).output_tokens == 9
    assert request_cost(make_request(900), 128, None).output_tokens == 128


def test_what_another_replica_has_made_is_to_be_computed_again() -> None:
    resumed = (ResumedSequence((1, 2, 3)), ResumedSequence((4,)))
    cost = request_cost(make_request(9, resumed, n=2), 128, None)
    assert cost.prompt_tokens == 44
    assert cost.num_sequences == 2


def test_blocks_are_hashed_once_it_is_known_how() -> None:
    request = make_request(9)
    assert not request_cost(request, 128, None).block_hashes
    cost = request_cost(request, 128, ("model", 16))
    assert cost.block_hashes == prompt_chain(request, "model", 16)
    assert len(cost.block_hashes) == 2
    assert cost.block_size == 16
