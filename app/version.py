"""Which Quire this is."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """The installed version; "unknown" when run from a source tree that was never installed."""
    try:
        return importlib.metadata.version("quire")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
