"""The compiled libraries, looked at before anything starts: one left from another version is told at once."""

from __future__ import annotations

from app.balancer import native
from engine.kernels.library import load_library


def check_libraries() -> None:
    """Load those that every machine can. One that is not there is no error: Python and torch do its work.

    Raises:
        ConfigError: one was built from other sources than these, or QUIRE_LIBRARY_PATH names no folder.
    """
    native.is_available()
    load_library("cpu")
