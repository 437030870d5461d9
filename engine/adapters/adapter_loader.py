"""Adapters made ready for a device beside the steps, so that nobody waits for a file that only one request needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from engine.adapters.lora_adapter import LoraAdapter

# What a device's worker makes of an adapter before it can put it into a slot; None if it does all in the step.
Prepare = Callable[[LoraAdapter], object]


class Loaded(NamedTuple):
    """What a worker gets with an adapter's slot, and how many seconds it took."""

    prepared: object
    seconds: float


class AdapterLoader:
    """One thread that prepares adapters one after the other; it starts with the first.

    Args:
        prepare: called on that thread; None makes every adapter ready at once, with nothing prepared.
    """

    def __init__(self, prepare: Prepare | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._prepare = prepare
        self._clock = clock
        self._pool: ThreadPoolExecutor | None = None

    def start(self, adapter: LoraAdapter) -> Future[Loaded]:
        """Begin to prepare an adapter. The future raises whatever kept it from being read."""
        if self._prepare is None:
            done: Future[Loaded] = Future()
            done.set_result(Loaded(None, 0.0))
            return done
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        return self._pool.submit(self._load, self._prepare, adapter, self._clock())

    def close(self) -> None:
        """Begin no more; what is being prepared ends by itself. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, prepare: Prepare, adapter: LoraAdapter, due: float) -> Loaded:
        return Loaded(prepare(adapter), self._clock() - due)
