"""How one model's requests are admitted, as a configuration says: classes, bounds, tenants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from app.balancer.terms import DEFAULT_CLASS, RequestTerms


class ClassSettings(NamedTuple):
    """A class of requests. Of several the one of the lower `priority` goes first."""

    priority: int = 0
    ttft_deadline_s: float = 60.0


@dataclass(frozen=True)
class AdmissionSettings:
    """How one model's requests are admitted.

    Attributes:
        classes: by name.
        max_queued_requests, max_queued_tokens: bounds on what waits in an ingress; tokens are those of prompts not
            known to be cached, and expected output.
        tenant_header: a request may say whose it is; else that goes by its API key.
        tenant_weights: of tenants that are to have more or less than others, by the name that terms have.
        replica_queue_s: prompts that a replica has to compute before a request is sent there, at most; less if a
            class's deadline is short.
    """

    classes: Mapping[str, ClassSettings] = field(
        default_factory=lambda: MappingProxyType({DEFAULT_CLASS: ClassSettings()})
    )
    default_class: str = DEFAULT_CLASS
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4 << 20
    tenant_header: bool = False
    tenant_weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    replica_queue_s: float = 1.0


def terms_of_class(settings: AdmissionSettings, name: str | None = None) -> RequestTerms:
    """The terms of a class by its name, or of the default one. KeyError if there is none of that name."""
    name = settings.default_class if name is None else name
    entry = settings.classes[name]
    return RequestTerms(name, entry.priority, entry.ttft_deadline_s)
