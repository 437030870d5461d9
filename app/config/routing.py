"""How an ingress spreads requests over the replicas of a model, and which it lets in."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from app.balancer.admission_settings import AdmissionSettings, ClassSettings
from app.balancer.policies import DEFAULT_POLICY, make_policy
from app.balancer.terms import DEFAULT_CLASS
from app.config.args import Args
from app.config.names import check_name

# What a tenant is called that goes by its API key, or that brings none (app/ingress/auth.py).
_TENANT_OF_KEY = re.compile(r"key-[0-9a-f]{12}|anonymous")


class BalancerArgs(Args):
    """How an ingress spreads a model's requests over its replicas.

    Attributes:
        policy: `cheapest` weighs waiting, cached prefixes, decoding and eviction in seconds; the others are known
            balancers' rules, for comparison.
        hold_ms: a request that would wait longer than this for prompts queued on the best replica waits in the ingress
            instead, where shorter prompts go first; None sends every request on at once, and so does a fleet of more
            than 128 replicas, unless there is admission.
    """

    policy: str = DEFAULT_POLICY
    hold_ms: float | None = Field(default=None, ge=0)

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        make_policy(value)
        return value


class ClassArgs(Args):
    """A class of requests. Of several the one of the lower `priority` goes first; `ttft_deadline_s` is from a request's
    arrival to its first token: a request that would have it later is refused."""

    priority: int = Field(default=0, ge=0, le=100)
    ttft_deadline_s: float = Field(default=60.0, gt=0, le=3600)


class AdmissionArgs(Args):
    """Which requests an ingress lets wait for a model, in which order, and which it refuses.

    Attributes:
        classes: by the name that requests give in `X-Quire-Class`.
        default_class: of requests that give none; may be left out where there is one.
        max_queued_requests, max_queued_tokens: how much may wait in an ingress; tokens of prompts and expected output.
        tenants: shares of tenants that are to have more or less than others, whose is 1.
        tenant_header: requests may name their tenant in `X-Quire-Tenant`; otherwise it goes by their API key, and
            `tenants` can name none but `key-` and the first 12 hexadecimal digits of a key's SHA-256.
        replica_queue_ms: a request waits in the ingress rather than on a replica that has prompts of more than this to
            compute; a twentieth of the shortest deadline if that is less. `balancer.hold_ms` takes its place.
    """

    classes: dict[str, ClassArgs] = Field(default_factory=lambda: {DEFAULT_CLASS: ClassArgs()}, min_length=1)
    default_class: str | None = None
    max_queued_requests: int = Field(default=1024, ge=1, le=1 << 20)
    max_queued_tokens: int = Field(default=4 << 20, ge=1)
    tenants: dict[str, float] = Field(default_factory=dict)
    tenant_header: bool = False
    replica_queue_ms: float = Field(default=1000.0, gt=0, le=60_000)

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, value: dict[str, ClassArgs]) -> dict[str, ClassArgs]:
        return {check_name(name): entry for name, entry in value.items()}

    @field_validator("tenants")
    @classmethod
    def _check_tenants(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0.01 <= weight <= 100:
                raise ValueError(f"{name}={weight:g} must be 0.01 to 100")
        return value

    @model_validator(mode="after")
    def _check_default(self) -> Self:
        if self.default_class is None:
            if len(self.classes) > 1:
                raise ValueError(f"default_class: which of {', '.join(self.classes)}?")
        elif self.default_class not in self.classes:
            raise ValueError(f"default_class={self.default_class!r} is none of classes: {', '.join(self.classes)}")
        return self

    @model_validator(mode="after")
    def _check_tenant_names(self) -> Self:
        for name in self.tenants:
            if not (self.tenant_header or _TENANT_OF_KEY.fullmatch(name)):
                raise ValueError(
                    f"tenants.{name}: without tenant_header a tenant is called key- and the first 12 hexadecimal "
                    "digits of its API key's SHA-256, in lower case"
                )
        return self

    @property
    def settings(self) -> AdmissionSettings:
        """As the balancer takes them."""
        return AdmissionSettings(
            classes={name: ClassSettings(one.priority, one.ttft_deadline_s) for name, one in self.classes.items()},
            default_class=self.default_class or next(iter(self.classes)),
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            tenant_header=self.tenant_header,
            tenant_weights=self.tenants,
            replica_queue_s=self.replica_queue_ms / 1000.0,
        )


def check_hold(balancer: BalancerArgs, admission: AdmissionArgs | None) -> None:
    if balancer.hold_ms is None or admission is None:
        return
    if "replica_queue_ms" in admission.model_fields_set:
        raise ValueError("balancer.hold_ms takes the place of admission.replica_queue_ms: give one of them")
    for name, entry in admission.classes.items():
        if balancer.hold_ms >= 1000.0 * entry.ttft_deadline_s:
            raise ValueError(
                f"balancer.hold_ms={balancer.hold_ms:g} would leave requests on a replica for longer than "
                f"admission.classes.{name}.ttft_deadline_s={entry.ttft_deadline_s:g} allows"
            )
