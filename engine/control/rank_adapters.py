"""A rank's part of adapters, made ready beside the steps: rank 0 asks for it before a step loads it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from engine.adapters import LoraAdapter
from engine.control.connection import Connection, ControlError, Kind

logger = logging.getLogger(__name__)


class AdapterWorker(Protocol):
    """The part of a Worker that reads adapters."""

    def read_adapter(self, name: str, source: str) -> LoraAdapter:
        """This rank's part of an adapter."""
        ...

    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        """What can be made of it beside the steps, on any thread."""
        ...


class RankAdapters:
    """Prepares adapters on a thread of its own, one after the other, and keeps them until a step loads them.

    What was asked for and is never loaded, because another took its place first, is dropped after `num_kept` others.
    """

    def __init__(self, worker: AdapterWorker, num_kept: int, connection: Connection) -> None:
        self._worker = worker
        self._num_kept = num_kept
        self._connection = connection
        self._ready: OrderedDict[tuple[str, str], object] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quire-rank-adapters")

    def begin(self, number: int, name: str, source: str) -> None:
        """Prepare an adapter, and tell rank 0 when that is done, or why it failed. Any thread."""
        with contextlib.suppress(RuntimeError):  # closed: nobody waits for it any more
            self._pool.submit(self._prepare, number, name, source)

    def take(self, name: str, source: str) -> tuple[LoraAdapter, object]:
        """The adapter, and what was prepared of it; None if it has been dropped, and is left to the step."""
        with self._lock:
            prepared = self._ready.pop((name, source), None)
        return self._worker.read_adapter(name, source), prepared

    def close(self) -> None:
        """Begin no more. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, number: int, name: str, source: str) -> None:
        error = ""
        try:
            prepared = self._worker.prepare_adapter(self._worker.read_adapter(name, source))
            with self._lock:
                self._ready[name, source] = prepared
                while len(self._ready) > self._num_kept:
                    self._ready.popitem(last=False)
        except Exception as failure:
            logger.exception("adapter %s cannot be prepared", name)
            error = f"{type(failure).__name__}: {failure}"
        with contextlib.suppress(ControlError):  # the listener hears of it
            self._connection.send_json(Kind.ADAPTER_READY, number=number, error=error)
