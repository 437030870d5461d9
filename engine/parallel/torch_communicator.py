"""Collectives of torch tensors: NCCL between GPUs, gloo between CPUs, on one node or several."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from engine.errors import CommunicatorError
from engine.parallel.group import TensorParallelGroup


class TorchCommunicator:
    """One rank's end. It has its own process group, not torch's global one, so that engines in a process do not meet.

    Args:
        device: where the tensors are.

    Raises:
        CommunicatorError: another rank did not come in time.
    """

    def __init__(self, group: TensorParallelGroup, device: torch.device) -> None:
        self.rank, self.world_size = group.rank, group.world_size
        join_timeout, timeout = timedelta(seconds=group.join_timeout_s), timedelta(seconds=group.timeout_s)

        def join() -> Any:
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                group.host, group.port, group.world_size, is_master=group.rank == 0, timeout=join_timeout
            )
            named = distributed.PrefixStore(group.segment, store)  # type: ignore[attr-defined]
            if device.type == "cuda":
                options = distributed.ProcessGroupNCCL.Options()
                options._timeout = timeout
                return distributed.ProcessGroupNCCL(named, group.rank, group.world_size, options)
            return distributed.ProcessGroupGloo(named, group.rank, group.world_size, timeout)

        self._group = self._attempt("join", join)
        # A rank that does not come is found here rather than in the first step.
        self.all_reduce(torch.zeros(1, device=device))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        self._attempt("all_reduce", lambda: self._group.allreduce([tensor]).wait())

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's tensor, in the order of ranks. All bring the same shape."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self._attempt("all_gather", lambda: self._group.allgather([gathered], [tensor.contiguous()]).wait())
        return gathered

    def abort(self) -> None:
        """End every wait of this rank, and by that of the others. Any thread may call it."""
        self._group.abort()

    def _attempt(self, name: str, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except (RuntimeError, ValueError) as error:  # torch.distributed's own are RuntimeErrors
            reason = str(error).partition("\n")[0]
            raise CommunicatorError(f"rank {self.rank} of {self.world_size}: {name} failed: {reason}") from error
