"""From a request to the sequence group that the engine works on."""

from __future__ import annotations

from engine.errors import RequestError
from engine.request import EngineRequest, ResumedSequence
from engine.sequence import Sequence, SequenceGroup


def make_group(request: EngineRequest, seed: int, root_hash: bytes) -> SequenceGroup:
    """A request's group, with what it produced elsewhere.

    Raises:
        RequestError: nothing of it is left to do, or it cannot be resumed.
    """
    group = SequenceGroup(
        request.request_id,
        [_new_sequence(request, index, item) for index, item in enumerate(_starting_points(request))],
        request.sampling_params,
        seed,
        root_hash,
        request.arrival_time,
        request.adapter,
        request.timeline,
    )
    if group.is_finished:
        raise RequestError("every resumed sequence is finished", param="resumed")
    return group


def _starting_points(request: EngineRequest) -> tuple[ResumedSequence, ...]:
    """What each sequence starts with; a beam search starts as one, and grows to its width by forking."""
    params = request.sampling_params
    if params.ranks_at_end:
        if any(item.token_ids or item.finished for item in request.resumed):
            raise RequestError("a request that ranks its sequences cannot be resumed half done", param="resumed")
        return (ResumedSequence(),) * (1 if params.use_beam_search else params.width)
    return request.resumed or (ResumedSequence(),) * params.n


def _new_sequence(request: EngineRequest, index: int, resumed: ResumedSequence) -> Sequence:
    seq = Sequence(request.prompt_token_ids, index)
    for token_id in resumed.token_ids:
        seq.append_token(token_id, 0.0)
    seq.cumulative_logprob = resumed.cumulative_logprob
    if resumed.finished:
        seq.finish("stop")
    return seq
