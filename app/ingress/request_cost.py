"""What a request will cost the replica that takes it, as far as an ingress can tell."""

from __future__ import annotations

from app.balancer import RequestCost
from app.ingress.prompt_chain import prompt_chain
from engine.request import EngineRequest


def request_cost(request: EngineRequest, expected_output_tokens: int, hashing: tuple[str, int] | None) -> RequestCost:
    """Its tokens, those that another replica has made of it already included, and the hashes of its blocks.

    Args:
        expected_output_tokens: what it is taken to produce, if its `max_tokens` allows.
        hashing: the model's fingerprint and the block size with which replicas hash prompts; without it there are no
            hashes.
    """
    params = request.sampling_params
    produced = sum(len(sequence.token_ids) for sequence in request.resumed)
    expected = expected_output_tokens
    if params.max_tokens is not None:
        expected = min(expected, params.max_tokens)
    num_tokens = len(request.prompt_token_ids) + produced
    if hashing is None:
        return RequestCost(num_tokens, expected, params.n, adapter=request.adapter)
    fingerprint, block_size = hashing
    chain = prompt_chain(request, fingerprint, block_size)
    return RequestCost(num_tokens, expected, params.n, chain, block_size, request.adapter)
