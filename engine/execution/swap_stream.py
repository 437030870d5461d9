"""Swaps on a stream of their own (§4.5): beside the computation, and ordered with it by events.

A step's swaps are queued while the step before it still runs, and overlap with it:

    compute   | copies N | forward N ............ |          | copies N+1 | forward N+1 ...
    swap            └──wait──► swap in N+1 ...... └──wait────►
                     swap out N+1 ...

What orders them, and so what makes a block under copy neither free nor readable before it is copied:

- Step N+1 begins when its own swaps have ended.
- Swapping in writes free blocks. A step in flight keeps the blocks that it computes on, so none of those is free; but
  it may still read a block that has been given up as the source of a copy-on-write, which is the first thing it does.
  So swapping in waits for the copies of the step before, not for its end.
- Swapping out reads blocks of a group that is in no step in flight (no other is preempted): what wrote them has been
  collected. It waits for nothing.
- Swaps follow one another, so that a host block is read after it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from engine.memory import BlockCopy

# Moves blocks, device to host if the second argument is true; queued on the current stream.
Move = Callable[[Sequence[BlockCopy], bool], None]


class Stream(Protocol):
    """Work in order on a device; torch.cuda.Stream is one."""

    def record_event(self) -> Any:
        """A mark behind what is queued so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """What is queued from now on begins after `event`."""
        ...


class SwapStream:
    """Queues each step's swaps, and the waits between them and the computation.

    Args:
        swap: the stream for swaps; `compute` gives the one on which the caller's step is queued.
        use: makes a stream the current one.
        move: queues copies of blocks on the current stream.
    """

    def __init__(
        self,
        swap: Stream,
        compute: Callable[[], Stream],
        use: Callable[[Stream], AbstractContextManager[Any]],
        move: Move,
    ) -> None:
        self._swap = swap
        self._compute = compute
        self._use = use
        self._move = move
        self._copied: Any = None  # the end of the latest step's copies-on-write

    def begin_step(
        self,
        swap_out: Sequence[BlockCopy],
        swap_in: Sequence[BlockCopy],
        copies: Sequence[BlockCopy],
        copy: Callable[[Sequence[BlockCopy]], None],
    ) -> None:
        """Queue a step's swaps, then on the compute stream its copies-on-write: what follows there sees them all."""
        compute = self._compute()
        if swap_out or swap_in:
            with self._use(self._swap):
                if swap_out:
                    self._move(swap_out, True)
                if swap_in:
                    if self._copied is not None:
                        self._swap.wait_event(self._copied)
                    self._move(swap_in, False)
            compute.wait_event(self._swap.record_event())
        if copies:
            copy(copies)
            self._copied = compute.record_event()
