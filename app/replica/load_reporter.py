"""Tells all ingresses a replica's load, when it has changed and not too often."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from app.replica.block_log import BlockLog
from app.replica.load import RateMeter, load_report
from app.replica.stream_server import StreamServer
from app.transport.messages import encode_load
from engine.outputs import EngineStats

# Load leaves at most this often, and within this time of a change in what waits and runs ...
MIN_INTERVAL_S = 0.005
# ... and within this while nothing happens but that sequences grow.
GROWTH_INTERVAL_S = 0.05


class _Admission(NamedTuple):
    """An attempt that the engine has queued when it had taken so many steps."""

    num_steps: int
    attempt: int
    uncached_tokens: int


class LoadReporter:
    """Wakes only for changes. On the server's thread, once the server runs.

    The engine's numbers include a request when a step has taken it in. Its ingress knows of it and is told then; the
    others are told of its prompt at once, or they would send theirs here meanwhile.

    Args:
        stats: of the engine as of its last step; another object after each.
    """

    def __init__(self, stats: Callable[[], EngineStats], server: StreamServer, blocks: BlockLog) -> None:
        self._stats = stats
        self._server = server
        self._blocks = blocks
        self._meter = RateMeter()
        self._admissions: dict[str, list[_Admission]] = {}
        self._has_news = False
        self._timer: asyncio.TimerHandle | None = None
        self._observed: EngineStats | None = None
        self._observed_at_s = -math.inf
        self._reported: EngineStats | None = None
        self._reported_at_s = -math.inf

    @property
    def meter(self) -> RateMeter:
        """What the replica has measured of itself."""
        return self._meter

    def subscribed(self, ingress_id: str) -> None:
        """An ingress has come, and is told at once."""
        self._admissions[ingress_id] = []
        self._server.send(ingress_id, self._frame(ingress_id, self._stats()))

    def unsubscribed(self, ingress_id: str) -> None:
        """An ingress has gone."""
        del self._admissions[ingress_id]

    def admitted(self, ingress_id: str, attempt: int, num_steps: int, uncached_tokens: int = 0) -> None:
        """The engine has queued an ingress's attempt when it had taken so many steps; tokens of its prompt to compute,
        0 if that is not known."""
        pending = self._admissions.get(ingress_id)
        if pending is not None:
            pending.append(_Admission(num_steps, attempt, uncached_tokens))
            self._has_news = self._has_news or (uncached_tokens > 0 and len(self._admissions) > 1)
            self._schedule()

    def ended(self, ingress_id: str, attempt: int) -> None:
        """An attempt is over, perhaps before any step."""
        pending = self._admissions.get(ingress_id, [])
        for entry in pending:
            if entry.attempt == attempt:
                pending.remove(entry)
                self._has_news = True
                self._schedule()
                break

    def send_with(self, frames: Mapping[str, bytes]) -> None:
        """A step has ended: send each ingress its frame, in one write with the load if that is due."""
        if self._delay_s() <= 0.0:
            self._report(frames)
            return
        for ingress_id, frame in frames.items():
            self._server.send(ingress_id, frame)
        self._schedule()

    def _delay_s(self) -> float:
        """Seconds until the load is to be told; infinite if it is what was told last."""
        stats, last = self._stats(), self._reported
        if stats is last and not self._has_news:
            return math.inf
        now_s = time.monotonic()
        # Single steps measure what else the machine did: replicas would seem to differ in speed, and be chosen by it.
        if stats is not self._observed and now_s >= self._observed_at_s + MIN_INTERVAL_S:
            self._observed = stats
            self._observed_at_s = now_s
            self._meter.observe(stats, now_s)
        changed = self._has_news or last is None or _queue_of(stats) != _queue_of(last)
        changed = changed or any(self._admissions.values())
        return self._reported_at_s + (MIN_INTERVAL_S if changed else GROWTH_INTERVAL_S) - now_s

    def _schedule(self) -> None:
        delay_s = self._delay_s()
        if delay_s == math.inf:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._server.call_later(max(delay_s, 0.0), self._report)

    def _report(self, frames: Mapping[str, bytes] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._has_news = False
        self._reported = self._stats()
        self._reported_at_s = time.monotonic()
        for ingress_id in self._server.subscribers:
            frame = frames.get(ingress_id, b"") if frames else b""
            self._server.send(ingress_id, frame + self._frame(ingress_id, self._reported))

    def _frame(self, ingress_id: str, stats: EngineStats) -> bytes:
        pending = self._admissions[ingress_id]
        # A step that began after the request came has taken it in.
        admitted = tuple(entry.attempt for entry in pending if stats.num_steps > entry.num_steps)
        self._admissions[ingress_id] = [entry for entry in pending if stats.num_steps <= entry.num_steps]
        load = load_report(stats, self._meter, self._blocks.cache_age_s, admitted)
        coming = [
            entry.uncached_tokens
            for other, entries in self._admissions.items()
            if other != ingress_id
            for entry in entries
            if entry.uncached_tokens and stats.num_steps <= entry.num_steps
        ]
        if coming:
            load = replace(
                load,
                num_waiting=load.num_waiting + len(coming),
                num_waiting_tokens=load.num_waiting_tokens + sum(coming),
            )
        return encode_load(load)


def _queue_of(stats: EngineStats) -> tuple[object, ...]:
    """What a balancer must hear of at once."""
    return (
        *(stats.num_waiting, stats.num_running, stats.num_waiting_tokens, stats.num_preemptions),
        stats.adapters.resident,
    )
