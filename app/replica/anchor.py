"""What stands at the root of an application that is one model, so that its engine deployment need not."""

from __future__ import annotations

from typing import Any


class ModelAnchor:
    """A deployment without replicas.

    Serve takes an application's root for its HTTP entrance: behind HAProxy each replica of it opens a port of its own,
    and it may have no request router but Serve's. A model is reached by its engine's handle; nobody ever calls this
    one, so that it stays at the zero replicas that it begins with.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
