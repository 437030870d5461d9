"""API keys: who may use the model endpoints."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import Request

from app.ingress.errors import AuthenticationError

# The tenant of all requests where no keys are asked for.
ANONYMOUS = "anonymous"


class ApiKeys:
    """The keys that are accepted; without any, everyone is. They can change while it serves."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests: tuple[bytes, ...] = ()
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """Accept these keys from now on, and no others. Only their digests are kept."""
        self._digests = tuple(_digest(key) for key in keys)

    def check(self, request: Request) -> str:
        """Whose request it is: a name made from its key, never the key; ANONYMOUS if everyone is let in.

        Raises:
            AuthenticationError: it does not bring an accepted key as its bearer token.
        """
        if not self._digests:
            return ANONYMOUS
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise AuthenticationError(
                "no API key given; send it as 'Authorization: Bearer KEY'", code="missing_api_key"
            )
        # Headers are read as Latin-1, which keeps their bytes: what is not ASCII was sent as UTF-8.
        given = hashlib.sha256(key.strip(" \t").encode("latin-1")).digest()
        # All keys are compared, each in constant time: the time taken tells nothing about them.
        matches = [hmac.compare_digest(given, accepted) for accepted in self._digests]
        if not any(matches):
            raise AuthenticationError("the API key is not known", code="invalid_api_key")
        return tenant_of(given)


def tenant_of(digest: bytes) -> str:
    """The tenant of a key's SHA-256: `key-` and its first 12 hexadecimal digits."""
    return f"key-{digest.hex()[:12]}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
