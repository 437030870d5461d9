"""One submission of a request to a replica, and the bounds that all of a client's have."""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.ingress.request_journal import RequestJournal
from app.telemetry.request_trace import AttemptTrace
from engine.request import EngineRequest


class ClientOptions(NamedTuple):
    """Bounds of a ReplicaSetClient.

    Attributes:
        max_attempts: failures of replicas under one request before it fails; being drained is none.
        max_unread_tokens: tokens of one request that wait for a late reader.
        placement_timeout_s: how long a request waits for a replica, a cold start included.
        final_record_s: how long after its Serve call has returned a request waits for its last tokens.
        expected_output_tokens: what a request is taken to produce, if its `max_tokens` allows.
        call_after_s: how long the Serve call of a request that its replica has by socket already waits for the first
            token, beside which it would compute.
    """

    max_attempts: int = 4
    max_unread_tokens: int = 32768
    placement_timeout_s: float = 600.0
    final_record_s: float = 5.0
    expected_output_tokens: int = 128
    call_after_s: float = 0.25


@dataclass(slots=True)
class Attempt:
    """One submission of `request`. `num_received` is compared with the final record's count; `waited_s` is the age of
    the request when it went out; `trace` is set if the request is sampled.

    `submitted_to`: the replica that has it by socket already, ahead of its call, which can then go nowhere else.
    `call_due`: the timer of that call, until it goes out. `turned_away`: that replica did not take the call.
    """

    number: int
    journal: RequestJournal
    request: EngineRequest
    context: contextvars.Context
    num_failures: int
    excluded: frozenset[str]
    response: Any = None
    task: asyncio.Task[None] | None = None
    num_received: int = 0
    prompt_computed: bool = False
    waited_s: float = 0.0
    trace: AttemptTrace | None = None
    submitted_to: str | None = None
    call_due: asyncio.TimerHandle | None = None
    turned_away: bool = False
