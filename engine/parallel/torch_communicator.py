"""Collectives of torch tensors: NCCL between GPUs, gloo between CPUs, on one node or several."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from engine.errors import CommunicatorError, ConfigError
from engine.parallel.cancellation import Cancellation
from engine.parallel.group import TensorParallelGroup

_ABORT_POLL = timedelta(milliseconds=200)
_JOIN_POLL_S = 0.02


class TorchCommunicator:
    """One rank's end. It has its own process group, not torch's global one, so that engines in a process do not meet.

    Args:
        device: where the tensors are.
        cancellation: ends the wait for the other ranks to join, and waits in collectives on a CPU.

    Raises:
        CommunicatorError: another rank did not come in time.
    """

    def __init__(
        self, group: TensorParallelGroup, device: torch.device, cancellation: Cancellation | None = None
    ) -> None:
        self.rank, self.world_size = group.rank, group.world_size
        self._on_cpu = device.type == "cpu"
        self._cancellation = cancellation or Cancellation()
        join_timeout, timeout = timedelta(seconds=group.join_timeout_s), timedelta(seconds=group.timeout_s)

        def join() -> Any:
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                group.host,
                group.port,
                group.world_size,
                is_master=group.rank == 0,
                timeout=join_timeout,
                wait_for_workers=False,
            )
            named = distributed.PrefixStore(group.segment, store)  # type: ignore[attr-defined]
            self._wait_for_all(named, group.join_timeout_s)
            if not self._on_cpu:
                self._check_one_gpu_each(named, device)
                options = distributed.ProcessGroupNCCL.Options()
                options._timeout = timeout
                return distributed.ProcessGroupNCCL(named, group.rank, group.world_size, options)
            return distributed.ProcessGroupGloo(named, group.rank, group.world_size, timeout)

        self._group = self._attempt("join", join)
        # A rank that does not come is found here rather than in the first step.
        self.all_reduce(torch.zeros(1, device=device))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        self._attempt("all_reduce", lambda: self._wait(self._group.allreduce([tensor])))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's tensor, in the order of ranks. All bring the same shape."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self._attempt("all_gather", lambda: self._wait(self._group.allgather([gathered], [tensor.contiguous()])))
        return gathered

    def abort(self) -> None:
        """End this rank's wait, and all collectives from now on, with a CommunicatorError. Any thread may call it. The
        other ranks notice at their deadlines, or as they are told likewise."""
        self._cancellation.set()
        self._group.abort()

    def _wait_for_all(self, store: Any, timeout_s: float) -> None:
        """torch's own waits for ranks to join can be neither cancelled nor made to say who is missing."""
        store.set(f"rank {self.rank}", "joins")
        deadline = time.monotonic() + timeout_s
        for rank in range(self.world_size):
            while not store.check([f"rank {rank}"]):
                self._cancellation.check()
                if time.monotonic() > deadline:
                    raise CommunicatorError(f"rank {rank} has not joined rank {self.rank} within {timeout_s:g} s")
                time.sleep(_JOIN_POLL_S)

    def _wait(self, work: Any) -> None:
        """gloo's abort ends no wait, so that waits on the CPU are short ones, one after another. On a GPU it is the
        stream that waits."""
        if not self._on_cpu:
            work.wait()
            return
        while True:
            if self._cancellation.is_set():
                raise RuntimeError("aborted on this rank")
            try:
                work.wait(_ABORT_POLL)
                return
            except RuntimeError:
                if work.is_completed():  # with an error, which this raises, or a moment after the wait
                    work.wait()
                    return

    def _check_one_gpu_each(self, store: Any, device: torch.device) -> None:
        """NCCL would only say that its usage was invalid."""
        own = str(torch.cuda.get_device_properties(device).uuid)
        store.set(f"gpu {self.rank}", own)
        for other in range(self.rank):
            if store.get(f"gpu {other}").decode() == own:
                raise ConfigError(
                    f"tensor_parallel_size={self.world_size} needs as many GPUs: ranks {other} and {self.rank} would "
                    f"share GPU {own}"
                )

    def _attempt(self, name: str, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except (RuntimeError, ValueError) as error:  # torch.distributed's own are RuntimeErrors
            reason = str(error).partition("\n")[0]
            raise CommunicatorError(f"rank {self.rank} of {self.world_size}: {name} failed: {reason}") from error
