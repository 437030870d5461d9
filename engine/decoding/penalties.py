"""What a request changes in the logits before a token is drawn."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from engine.scheduling import SampleRequest


def changes_logits(request: SampleRequest) -> bool:
    """Whether `apply_biases_and_penalties` changes anything."""
    params = request.sampling_params
    return bool(params.logit_bias) or params.has_penalties or _too_short(request)


def banned_tokens(request: SampleRequest, eos_token_ids: SequenceOf[int]) -> list[int]:
    """What cannot be drawn: tokens that would end the sequence before `min_tokens`."""
    params = request.sampling_params
    if not _too_short(request):
        return []
    return [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]


def _too_short(request: SampleRequest) -> bool:
    return request.position - request.num_prompt_tokens < request.sampling_params.min_tokens


def apply_biases_and_penalties(
    logits: npt.NDArray[np.float32], request: SampleRequest, eos_token_ids: SequenceOf[int]
) -> npt.NDArray[np.float32]:
    """Logit bias, repetition, frequency and presence penalties, and no stop token before `min_tokens`.

    Args:
        logits: float32 `[vocab_size]`; returned as it is if nothing applies, else copied.
    """
    if not changes_logits(request):
        return logits
    params = request.sampling_params
    shaped = logits.copy()
    if params.repetition_penalty != 1.0:
        seen = np.unique(request.token_ids)
        values = shaped[seen]
        shaped[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        drawn, counts = np.unique(request.token_ids[request.num_prompt_tokens :], return_counts=True)
        shaped[drawn] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
    for token_id, bias in params.logit_bias.items():
        shaped[token_id] += bias
    shaped[banned_tokens(request, eos_token_ids)] = -np.inf
    return shaped
