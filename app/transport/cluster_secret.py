"""The cluster's secret, made once and kept in Ray's control store. The one file of the transport that knows Ray."""

from __future__ import annotations

import secrets

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

_KEY = b"quire:transport-secret"
_NAMESPACE = b"quire"


def cluster_secret() -> bytes:
    """32 bytes that every process of this Ray cluster shares. Whoever comes first makes them; all read them back."""
    _internal_kv_put(_KEY, secrets.token_bytes(32), overwrite=False, namespace=_NAMESPACE)
    secret: bytes | None = _internal_kv_get(_KEY, namespace=_NAMESPACE)
    if secret is None or len(secret) != 32:
        raise RuntimeError("Ray's control store did not keep the transport's secret")
    return secret
