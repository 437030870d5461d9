"""Rank 0's end of the control channel: starts the other ranks, sends each step once, and notices whom it has lost."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from engine.config import CacheConfig, EngineConfig
from engine.control.connection import Connection, ControlError, Invitation, Kind, admit
from engine.control.futex import futexes_work
from engine.control.rank import STEP_NUMBER, RankSetup, node_identity
from engine.control.rank_link import RankLink
from engine.control.shared_ring import RingError, RingWriter
from engine.errors import CommunicatorError, ModelLoadError, QuireError
from engine.parallel import TensorParallelGroup
from engine.preemption import SwapCost

logger = logging.getLogger(__name__)

# A rank that says nothing for so long, or is so long behind a step that rank 0 has finished, hangs.
HANG_S = 8.0
_WATCH_INTERVAL_S = 0.2
_JOIN_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 24 * 3600.0
# When rank 0's own step fails, the reason may be a rank whose end is noticed a moment later.
_CAUSE_S = 1.0


class WorkerLauncher(Protocol):
    """Brings the other ranks to life: as processes here, as actors anywhere.

    Attributes:
        host: an address of this process that they all can reach.
    """

    host: str

    def launch(self, invitations: Sequence[Invitation]) -> None:
        """Start a process for each, which gives its invitation to `serve_rank`."""
        ...

    def ended(self, rank: int) -> str | None:
        """Why the rank's process has ended; None while it has not."""
        ...

    def close(self) -> None:
        """End what is left of them. Idempotent."""
        ...


class WorkerGroup:
    """The other ranks of one engine. `start` first, then `load`, `build_caches`, and `broadcast` once a step.

    Args:
        launcher: starts the ranks' processes.
        hang_s: how long a rank may be silent, or behind a step that rank 0 has finished.
    """

    def __init__(self, size: int, launcher: WorkerLauncher, hang_s: float = HANG_S) -> None:
        assert size > 1
        self.size = size
        self._launcher = launcher
        self._hang_s = hang_s
        self._links: list[RankLink] = []
        self._ring: RingWriter | None = None
        self._num_sent = 0
        self._num_done = 0
        self._num_adapters = 0
        self._done_at = 0.0
        self._failure: QuireError | None = None
        self._leave: Callable[[], None] = lambda: None
        self._failed = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Launch the ranks and wait until all have joined. Raises CommunicatorError that names one that has not."""
        secret = secrets.token_hex(32)
        try:
            with socket.create_server((self._launcher.host, 0)) as listener:
                host, port = listener.getsockname()[:2]
                self._launcher.launch([Invitation(host, port, secret, rank) for rank in range(1, self.size)])
                joined = self._admit_all(listener, secret)
            for rank in range(1, self.size):
                link = RankLink(rank, joined[rank], self._lose)
                self._links.append(link)
                link.start()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="quire-ranks", daemon=True).start()

    def setups(self, model: str, config: EngineConfig, max_model_len: int, address: str) -> list[RankSetup]:
        """What each rank is told, rank 0 first."""
        nodes = [node_identity(), *(link.hello["node"] for link in self._links)]
        segment = f"quire-{secrets.token_hex(8)}"
        return [
            RankSetup(
                model, config, max_model_len, TensorParallelGroup(rank, self.size, nodes.count(node), address, segment)
            )
            for rank, node in enumerate(nodes)
        ]

    def begin_load(self, setups: Sequence[RankSetup]) -> None:
        """Let all ranks load their parts; `setups` begins with rank 0's, which is the caller's to follow."""
        for link in self._links:
            with self._reaching(link):
                link.connection.send_json(Kind.SETUP, **setups[link.rank].to_json())

    def num_blocks(self) -> list[int]:
        """KV blocks that fit on each of the other ranks, once they have loaded. Raises what stopped one."""
        return [int(self._await(link, Kind.LOADED)["num_blocks"]) for link in self._links]

    def begin_caches(self, cache_config: CacheConfig, max_model_len: int) -> None:
        """Let all ranks build their pools, and connect those of this node to the shared memory."""
        here = node_identity()
        local = [link for link in self._links if link.hello["node"] == here] if futexes_work() else []
        if local:
            self._ring = RingWriter(len(local))
        for link in self._links:
            link.in_ring = link in local
            fields = {
                "cache": dataclasses.asdict(cache_config),
                "max_model_len": max_model_len,
                "ring": self._ring.name if self._ring is not None and link.in_ring else "",
                "reader": local.index(link) if link.in_ring else 0,
            }
            with self._reaching(link):
                link.connection.send_json(Kind.CACHE, **fields)

    def swap_costs(self) -> list[SwapCost]:
        """What each of the other ranks measured, of those with a swap pool, once all are ready for steps."""
        found = [self._await(link, Kind.READY)["swap_cost"] for link in self._links]
        if self._ring is not None:
            self._ring.unlink()
        return [SwapCost(*cost) for cost in found if cost is not None]

    def begin_adapter(self, name: str, source: str) -> int:
        """Have all ranks prepare an adapter beside the steps; its number, for `await_adapter`. On one thread."""
        self._num_adapters += 1
        for link in self._links:
            with self._reaching(link):
                link.connection.send_json(Kind.ADAPTER, number=self._num_adapters, name=name, source=source)
        return self._num_adapters

    def await_adapter(self, number: int) -> None:
        """Wait until all ranks have prepared it.

        Raises:
            ModelLoadError: one cannot; the message names the rank.
            CommunicatorError: one is lost, or the group was closed.
        """
        for link in self._links:
            while (answer := self._await(link, Kind.ADAPTER_READY))["number"] != number:
                pass  # of one that was given up, as another rank had failed to prepare it
            if answer["error"]:
                raise ModelLoadError(f"rank {link.rank}: {answer['error']}")

    def rouse(self) -> None:
        """A step follows at once: ranks that sleep are woken while it is encoded, which takes as long."""
        if self._ring is not None:
            self._ring.rouse()

    def broadcast(self, message: bytes) -> None:
        """Send a step to all ranks. Raises CommunicatorError if one is lost, or takes nothing any more."""
        self.check_health()
        self._num_sent += 1
        whole = STEP_NUMBER.pack(self._num_sent) + message
        if self._ring is not None:
            try:
                self._ring.publish(whole, self._hang_s)
            except RingError as error:
                raise self.cause_of(CommunicatorError(f"a rank no longer takes steps: {error}")) from None
        for link in self._links:
            if not link.in_ring:
                with self._reaching(link):
                    link.connection.send(Kind.STEP, whole, self._hang_s)

    def finished(self) -> None:
        """Rank 0 has done the step that was sent last."""
        self._done_at = time.monotonic()
        self._num_done = self._num_sent

    def check_health(self) -> None:
        """Raise CommunicatorError, which names the rank, if one is lost, hangs or fell out of step."""
        if self._failure is not None:
            raise self._failure

    def when_lost(self, leave: Callable[[], None]) -> None:
        """Have `leave` called once a rank is lost, on a thread of this group, or now if one is: rank 0 is then to leave
        what waits for it. Takes the place of what was asked for before."""
        with self._lock:
            self._leave = leave
            is_lost = self._failure is not None
        if is_lost:
            leave()

    def cause_of(self, error: Exception) -> Exception:
        """The lost rank behind an error of rank 0's step, or the error itself if all others are well."""
        if isinstance(error, CommunicatorError):
            self._failed.wait(_CAUSE_S)
        return self._failure or error

    def close(self) -> None:
        """End all ranks. Idempotent."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        for link in self._links:
            link.say_stop()
        if self._ring is not None:
            self._ring.abort()
            self._ring.unlink()
        self._launcher.close()
        for link in self._links:
            link.close()

    def _admit_all(self, listener: socket.socket, secret: str) -> dict[int, Connection]:
        joined: dict[int, Connection] = {}
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        listener.settimeout(_WATCH_INTERVAL_S)
        try:
            while len(joined) < self.size - 1:
                missing = [rank for rank in range(1, self.size) if rank not in joined]
                for rank in missing:
                    if (reason := self._launcher.ended(rank)) is not None:
                        raise CommunicatorError(f"rank {rank} ended before it joined: {reason}")
                if time.monotonic() > deadline:
                    raise CommunicatorError(f"rank {missing[0]} did not join within {_JOIN_TIMEOUT_S:g} s")
                with contextlib.suppress(TimeoutError):
                    sock, peer = listener.accept()
                    self._admit(sock, peer, secret, missing, joined)
        except BaseException:
            for connection in joined.values():
                connection.close()
            raise
        return joined

    def _admit(
        self, sock: socket.socket, peer: object, secret: str, missing: list[int], joined: dict[int, Connection]
    ) -> None:
        """A stranger is turned away, and the ranks are waited for as before."""
        try:
            connection, rank = admit(sock, secret)
        except ControlError as error:
            logger.warning("a connection from %s was turned away: %s", peer, error)
            return
        if rank in missing:
            joined[rank] = connection
        else:
            logger.warning("a connection from %s says that it is rank %d, which is not awaited", peer, rank)
            connection.close()

    def _await(self, link: RankLink, kind: Kind) -> dict[str, Any]:
        """A rank's answer; ends early if any rank is lost."""
        deadline = time.monotonic() + _LOAD_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check_health()
            if self._closed.is_set():
                raise CommunicatorError("the ranks have been told to end")
            answer = link.answer(kind, _WATCH_INTERVAL_S)
            if answer is not None:
                return answer
        raise CommunicatorError(f"rank {link.rank} sent no {kind.name} within {_LOAD_TIMEOUT_S:g} s")

    @contextlib.contextmanager
    def _reaching(self, link: RankLink) -> Iterator[None]:
        try:
            yield
        except ControlError as error:
            raise self.cause_of(CommunicatorError(f"rank {link.rank} cannot be reached: {error}")) from None

    # On the links' threads and the watching one

    def _lose(self, error: QuireError) -> None:
        """The first loss is the reason for all that follow."""
        with self._lock:
            if self._closed.is_set() or self._failure is not None:
                return
            self._failure = error
            leave = self._leave
        self._failed.set()
        logger.error("tensor parallelism has ended: %s", error)
        if self._ring is not None:
            self._ring.abort()
        leave()

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_INTERVAL_S) and self._failure is None:
            now = time.monotonic()
            behind_s = now - self._done_at
            for link in self._links:
                silent_s = now - link.heard_at
                if silent_s > self._hang_s:
                    self._lose(CommunicatorError(f"rank {link.rank} has been silent for {silent_s:.0f} s"))
                elif link.num_done < self._num_done and behind_s > self._hang_s:
                    what = f"hangs in step {link.num_done + 1}, which rank 0 ended {behind_s:.0f} s ago"
                    self._lose(CommunicatorError(f"rank {link.rank} {what}"))
