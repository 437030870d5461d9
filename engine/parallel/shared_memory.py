"""The native CPU engine's collectives: csrc/cpu/communicator.cpp over a file in shared memory."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NoReturn

import numpy as np

from engine.errors import CommunicatorError
from engine.kernels.communicator_abi import COMMUNICATION_FAILED, CommunicatorParams
from engine.kernels.library import KernelLibrary
from engine.loading.stored_tensor import FloatArray
from engine.parallel.cancellation import Cancellation
from engine.parallel.group import TensorParallelGroup

_FOLDER = Path("/dev/shm")
_NANOSECONDS = 1e9


def segment_path(segment: str) -> Path:
    """Where a group's shared memory lies until all of its ranks have joined."""
    return _FOLDER / segment


class SharedMemoryCommunicator:
    """One rank's end. Made when all ranks have come; one thread at a time is in a collective.

    Args:
        cancellation: ends the wait for them.

    Raises:
        CommunicatorError: another rank did not come in time, or came with another group.
    """

    def __init__(
        self, library: KernelLibrary, group: TensorParallelGroup, cancellation: Cancellation | None = None
    ) -> None:
        self.rank, self.world_size = group.rank, group.world_size
        self._library = library
        self._handle = ctypes.c_void_p()
        params = CommunicatorParams()
        params.path = str(segment_path(group.segment)).encode()
        params.timeout_ns = int(group.timeout_s * _NANOSECONDS)
        params.join_timeout_ns = int(group.join_timeout_s * _NANOSECONDS)
        params.cancelled = cancellation.address if cancellation is not None else None
        params.rank, params.world_size = group.rank, group.world_size
        status = library.symbols.quire_communicator_join(ctypes.byref(params), ctypes.byref(self._handle))
        if status:
            self._fail(status, "communicator_join")

    def __del__(self) -> None:
        if self._handle:
            self._library.symbols.quire_communicator_leave(self._handle)

    @property
    def handle(self) -> ctypes.c_void_p:
        """For structs of the native engine; it holds as long as this object lives."""
        return self._handle

    def all_reduce(self, values: FloatArray) -> None:
        """Sum over the ranks, in place."""
        assert values.flags.c_contiguous
        assert values.dtype == np.float32
        status = self._library.symbols.quire_all_reduce(self._handle, values.ctypes.data, values.size)
        if status:
            self._fail(status, "all_reduce")

    def gather(self, values: FloatArray) -> FloatArray:
        """`[world_size, *values.shape]` on rank 0, empty elsewhere. All ranks bring the same shape."""
        assert values.flags.c_contiguous
        assert values.dtype == np.float32
        count = self.world_size if self.rank == 0 else 0
        gathered = np.empty((count, *values.shape), dtype=np.float32)
        status = self._library.symbols.quire_gather(self._handle, values.ctypes.data, values.size, gathered.ctypes.data)
        if status:
            self._fail(status, "gather")
        return gathered

    def abort(self) -> None:
        """End every rank's wait, and all collectives from now on, with a CommunicatorError. Any thread may call it."""
        self._library.symbols.quire_communicator_abort(self._handle)

    def _fail(self, status: int, operation: str) -> NoReturn:
        if status == COMMUNICATION_FAILED:
            raise CommunicatorError(f"rank {self.rank}: {self._library.last_error()}")
        self._library.raise_last_error(operation)
