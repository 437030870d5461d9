"""On what terms a request is served: its class, its tenant, and when its first token is due; or why it is not."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

DEFAULT_CLASS = "default"

# Foreseen at arrival to be too late; nothing more may wait; gone for others that go first; too late after all.
RefusalReason = Literal["deadline", "full", "shed", "late"]


class RequestTerms(NamedTuple):
    """What admission goes by.

    Attributes:
        class_name: one of the configuration's classes, never what a request made up: it may label a metric.
        priority: of the class; lower goes first.
        ttft_deadline_s: from its arrival to its first token; a request that cannot have it by then is refused.
        tenant: requests of different tenants share what there is, whoever sends more.
        fingerprint: equal if a request comes again; 0 for one that cannot be told from others.
    """

    class_name: str = DEFAULT_CLASS
    priority: int = 0
    ttft_deadline_s: float = math.inf
    tenant: str = ""
    fingerprint: int = 0


DEFAULT_TERMS = RequestTerms()


class Refusal(NamedTuple):
    """Why a request is refused, in a word and for people, and in how many seconds it may come again."""

    reason: RefusalReason
    message: str
    retry_after_s: int
