"""From a request's headers to its terms: class, tenant, deadline."""

from __future__ import annotations

import hashlib
import re

from starlette.datastructures import Headers

from app.balancer import RequestTerms
from app.balancer.admission_settings import AdmissionSettings, terms_of_class
from engine.errors import RequestError

CLASS_HEADER = "x-quire-class"
TENANT_HEADER = "x-quire-tenant"
DEADLINE_HEADER = "x-quire-deadline-ms"
MAX_DEADLINE_MS = 3_600_000

_SOUND_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")


def request_terms(headers: Headers, settings: AdmissionSettings, key_tenant: str, request: bytes) -> RequestTerms:
    """The terms on which a request comes.

    Args:
        key_tenant: who it is by its API key.
        request: what is alike if it comes again: its path and its body.

    Raises:
        RequestError: a header says what is no class, no tenant or no deadline.
    """
    name = headers.get(CLASS_HEADER)
    if name is not None and name not in settings.classes:
        known = ", ".join(settings.classes)
        raise RequestError(f"{CLASS_HEADER}: there is no class {name!r}; known: {known}", CLASS_HEADER, "unknown_class")
    terms = terms_of_class(settings, name)
    tenant = _tenant(headers, settings, key_tenant)
    digest = hashlib.blake2b(request, digest_size=8, person=b"quire-request", salt=_salt(terms.class_name, tenant))
    return terms._replace(
        tenant=tenant,
        ttft_deadline_s=_deadline_s(headers, terms.ttft_deadline_s),
        fingerprint=int.from_bytes(digest.digest(), "little", signed=True),
    )


def _salt(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def _tenant(headers: Headers, settings: AdmissionSettings, key_tenant: str) -> str:
    given = headers.get(TENANT_HEADER)
    if given is None:
        return key_tenant
    if not settings.tenant_header:
        message = f"{TENANT_HEADER}: the tenant goes by the API key here; the model's admission.tenant_header is off"
        raise RequestError(message, TENANT_HEADER, "tenant_header_off")
    if not _SOUND_TENANT.fullmatch(given):
        message = f"{TENANT_HEADER}: {given!r} must begin with a letter or digit and hold only letters, digits and "
        raise RequestError(message + ". _ : @ - (64 at most)", TENANT_HEADER, "invalid_value")
    return given


def _deadline_s(headers: Headers, default_s: float) -> float:
    given = headers.get(DEADLINE_HEADER)
    if given is None:
        return default_s
    if not (given.isascii() and given.isdecimal() and 1 <= int(given[:9]) <= MAX_DEADLINE_MS) or len(given) > 9:
        message = f"{DEADLINE_HEADER}: {given!r} must be a whole number of milliseconds, 1 to {MAX_DEADLINE_MS}"
        raise RequestError(message, DEADLINE_HEADER, "invalid_value")
    return int(given) / 1000.0
