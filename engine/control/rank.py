"""The life of a rank other than 0: joins, loads its part, then runs every step that rank 0 sends.

    join → SETUP → load → LOADED → CACHE → build the pool → READY → STEP, STEP, ... → STOP, or the line breaks

The main thread loads and computes. One thread listens to rank 0, so that what can never end is left; another sends
signs of life.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from engine.adapters import LoraAdapter
from engine.config import CacheConfig, EngineConfig
from engine.control.connection import ControlError, Frame, Invitation, Kind, join
from engine.control.rank_adapters import RankAdapters
from engine.control.shared_ring import RingError, RingReader
from engine.control.step_codec import decode_step
from engine.errors import CommunicatorError
from engine.parallel import Cancellation, TensorParallelGroup
from engine.preemption import SwapCost
from engine.scheduling import SamplerOutput, SchedulerOutput

logger = logging.getLogger(__name__)

STEP_NUMBER = struct.Struct("<Q")
BEAT_INTERVAL_S = 0.25

# How long a rank whose driver has gone may take to leave what it computes.
_LEAVE_S = 15.0


class RankWorker(Protocol):
    """The part of a Worker that the control channel uses."""

    swap_cost: SwapCost | None

    def choose_num_blocks(self, max_model_len: int) -> int:
        """KV blocks that fit on this rank."""
        ...

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        """Allocate the pool."""
        ...

    def read_adapter(self, name: str, source: str) -> LoraAdapter:
        """This rank's part of an adapter."""
        ...

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """What that takes while it is resident."""
        ...

    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        """What can be made of it beside the steps, on any thread."""
        ...

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        """Run a step together with the other ranks."""
        ...

    def abort(self) -> None:
        """Leave what waits for other ranks."""
        ...


class RankSetup(NamedTuple):
    """What a rank is told before it loads: the model's source, its options, and its place among the ranks."""

    model: str
    config: EngineConfig
    max_model_len: int
    group: TensorParallelGroup

    def to_json(self) -> dict[str, Any]:
        """For SETUP."""
        config = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        config["shared_prefixes"] = {}  # rank 0 sends them as steps
        return {
            "model": self.model,
            "config": config,
            "max_model_len": self.max_model_len,
            "group": dataclasses.asdict(self.group),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RankSetup:
        """Of SETUP."""
        return cls(
            fields["model"],
            EngineConfig.from_dict(fields["config"]),
            fields["max_model_len"],
            TensorParallelGroup(**fields["group"]),
        )


# Loads a rank's part; the Cancellation is set once loading is in vain.
WorkerFactory = Callable[[RankSetup, Cancellation], RankWorker]


def serve_rank(invitation: Invitation, make_worker: WorkerFactory) -> None:
    """Be a rank until rank 0 says STOP or has gone. Tells rank 0 why it fails, and raises that.

    Raises:
        ControlError: rank 0 cannot be reached, or says what was not awaited.
    """
    _Rank(invitation, make_worker).run()


def node_identity() -> str:
    """Equal for two processes if, and only if, they can share memory: one kernel, and one /dev/shm."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{Path('/dev/shm').stat().st_dev}"


class _Rank:
    def __init__(self, invitation: Invitation, make_worker: WorkerFactory) -> None:
        self._rank = invitation.rank
        self._make_worker = make_worker
        self._connection = join(invitation)
        self._worker: RankWorker | None = None
        self._adapters: RankAdapters | None = None
        self._ring: RingReader | None = None
        self._inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()  # None: no more will come
        self._cancellation = Cancellation()
        self._num_done = 0
        self._stopping = threading.Event()
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            threading.Thread(target=self._beat, name="quire-rank-beat", daemon=True).start()
            self._connection.send_json(Kind.HELLO, node=node_identity(), pid=os.getpid())
            threading.Thread(target=self._listen, name="quire-rank-listen", daemon=True).start()
            self._serve(self._start())
        except Exception as error:
            if self._stopping.is_set():
                return  # whatever broke, broke because rank 0 has ended
            self._report(error)
            raise
        finally:
            self._ended.set()
            self._connection.close()

    def _start(self) -> RankWorker:
        connection = self._connection
        setup = RankSetup.from_json(self._expect(Kind.SETUP).json())
        worker = self._worker = self._make_worker(setup, self._cancellation)
        for name, source in setup.config.adapters.items():
            worker.read_adapter(name, source)  # what this node has not, is said now
        connection.send_json(Kind.LOADED, num_blocks=worker.choose_num_blocks(setup.max_model_len))
        cache = self._expect(Kind.CACHE).json()
        if cache["ring"]:
            self._ring = RingReader(cache["ring"], cache["reader"])
        worker.build_cache(CacheConfig(**cache["cache"]), cache["max_model_len"])
        self._adapters = RankAdapters(worker, max(1, setup.config.max_loras), connection)
        connection.send_json(Kind.READY, swap_cost=worker.swap_cost)
        return worker

    def _serve(self, worker: RankWorker) -> None:
        assert self._adapters is not None, "it has started"
        while (message := self._next()) is not None:
            (number,) = STEP_NUMBER.unpack_from(message)
            if number != self._num_done + 1:
                raise CommunicatorError(
                    f"rank {self._rank} fell out of step: it was sent step {number} and expects {self._num_done + 1}"
                )
            worker.execute(decode_step(message[STEP_NUMBER.size :], self._adapters.take))
            self._num_done = number

    def _next(self) -> bytes | None:
        """The next step's message; None once this rank is to end."""
        if self._ring is not None:
            try:
                return self._ring.take(lambda: not self._stopping.is_set())
            except RingError:
                return None
        frame = self._inbox.get()
        return frame.body if frame is not None else None

    def _expect(self, kind: Kind) -> Frame:
        """However long rank 0 takes over its own part of the weights; its end ends the wait, whenever it comes."""
        frame = self._inbox.get()
        if frame is None or frame.kind != kind:
            raise ControlError(f"rank 0 said {'no more' if frame is None else frame.kind}, not {kind.name}")
        return frame

    # On threads of their own

    def _listen(self) -> None:
        try:
            while True:
                frame = self._connection.receive(3600.0)
                if frame is not None and frame.kind == Kind.STOP:
                    break
                if frame is not None and frame.kind == Kind.ADAPTER and self._adapters is not None:
                    self._adapters.begin(**frame.json())
                elif frame is not None:
                    self._inbox.put(frame)
        except ControlError as error:
            if not self._ended.is_set():
                logger.warning("rank %d ends: rank 0 has gone (%s)", self._rank, error)
        self._stopping.set()
        if self._adapters is not None:
            self._adapters.close()
        self._inbox.put(None)
        self._cancellation.set()
        if self._worker is not None and not self._ended.is_set():
            self._worker.abort()
        if not self._ended.wait(_LEAVE_S):
            logger.error("rank %d does not leave what it does; its process ends here", self._rank)
            os._exit(1)

    def _beat(self) -> None:
        try:
            while not self._ended.wait(BEAT_INTERVAL_S):
                self._connection.send(Kind.BEAT, STEP_NUMBER.pack(self._num_done))
        except ControlError:
            return  # the listener hears of it too

    def _report(self, error: Exception) -> None:
        try:
            self._connection.send_json(Kind.FAILED, error=type(error).__name__, message=str(error))
        except ControlError:
            logger.exception("rank %d failed, and rank 0 cannot be told", self._rank)
