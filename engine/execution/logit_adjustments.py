"""What penalties and biases change in a step's logits, as tables for the device.

engine/decoding/penalties.py says the same of logits on the host. Here a sequence's last token may be one that only the
device knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.decoding.penalties import banned_tokens
from engine.kernels.cuda_abi import ADJUSTED_ROW, ADJUSTMENT
from engine.scheduling import SampleRequest
from engine.sequence import PLACEHOLDER

_NOTHING = np.zeros(0, dtype=np.int32)


class LogitAdjustments(NamedTuple):
    """Tables of cuda_abi.ADJUSTED_ROW, one a request, and cuda_abi.ADJUSTMENT, at least one."""

    rows: npt.NDArray[np.void]
    adjustments: npt.NDArray[np.void]


def adjustments_of(
    requests: Iterable[SampleRequest], eos_token_ids: SequenceOf[int], drawn_before: Mapping[int, int]
) -> LogitAdjustments:
    """The tables of a step.

    Args:
        drawn_before: where the step before left its draw for a sequence, by sequence.
    """
    rows, parts = [], [np.zeros(1, dtype=ADJUSTMENT)]  # one that no row has: none would be no table
    first = 1
    for request in requests:
        params = request.sampling_params
        changes = _changes(request, eos_token_ids)
        awaited = params.has_penalties and request.token_ids[-1] == PLACEHOLDER
        rows.append(
            (
                params.frequency_penalty,
                params.presence_penalty,
                params.repetition_penalty,
                first,
                len(changes),
                drawn_before[request.seq_id] if awaited else -1,
            )
        )
        parts.append(changes)
        first += len(changes)
    return LogitAdjustments(np.array(rows, dtype=ADJUSTED_ROW), np.concatenate(parts))


def _changes(request: SampleRequest, eos_token_ids: SequenceOf[int]) -> npt.NDArray[np.void]:
    """Of one row, but for what an awaited token adds."""
    params = request.sampling_params
    known = request.token_ids[:-1] if request.token_ids[-1] == PLACEHOLDER else request.token_ids
    seen: npt.NDArray[np.integer[Any]] = np.unique(known) if params.repetition_penalty != 1.0 else _NOTHING
    drawn: npt.NDArray[np.integer[Any]] = _NOTHING
    counts: npt.NDArray[np.integer[Any]] = _NOTHING
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        drawn, counts = np.unique(known[request.num_prompt_tokens :], return_counts=True)
    biases = {**params.logit_bias, **dict.fromkeys(banned_tokens(request, eos_token_ids), float("-inf"))}
    biased = np.fromiter(biases, dtype=np.int32, count=len(biases))
    tokens = np.unique(np.concatenate((seen, drawn, biased)))
    changes = np.zeros(len(tokens), dtype=ADJUSTMENT)
    changes["token_id"] = tokens
    changes["seen"][np.searchsorted(tokens, seen)] = 1
    changes["count"][np.searchsorted(tokens, drawn)] = counts
    changes["bias"][np.searchsorted(tokens, biased)] = list(biases.values())
    return changes
