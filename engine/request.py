"""A request as the engine takes it: tokens in, sampling, and where an interrupted one stands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from engine.timeline import RequestTimeline


@dataclass(frozen=True)
class ResumedSequence:
    """What one sequence of an interrupted request had produced elsewhere; it goes on after its last token."""

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class EngineRequest:
    """One request, tokenised.

    Attributes:
        request_id: unique among the engine's live requests.
        prompt_token_ids: at least one id.
        cache_salt: seeds the prefix-cache hashes, so that tenants with different salts never share blocks.
        adapter: the name of the LoRA adapter that it is for; "" is the base. Seeds the prefix-cache hashes too.
        resumed: one entry a sequence for a request that ran elsewhere before (replica failure, drain); else empty.
        arrival_time: seconds of `time.monotonic()`; orders first come, first served.
        timeline: written by the engine as the request goes along, if given.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
    cache_salt: str = ""
    adapter: str = ""
    resumed: tuple[ResumedSequence, ...] = ()
    arrival_time: float = field(default_factory=time.monotonic)
    timeline: RequestTimeline | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.request_id:
            raise RequestError("request_id must not be empty", param="request_id")
        if len(self.prompt_token_ids) == 0:
            raise RequestError("the prompt must hold at least one token", param="prompt", code="empty_prompt")
        if self.resumed and len(self.resumed) != self.sampling_params.n:
            raise RequestError(
                f"resumed holds {len(self.resumed)} sequences for n={self.sampling_params.n}", param="resumed"
            )
