"""CUDA graphs for decoding: a step of single tokens is replayed whole, padded to a batch size that was captured."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from engine.execution.input_batch import InputBatch, StepInputs
from engine.scheduling import SchedulerOutput

# What a step computes from its inputs: logits, for all rows.
Compute = Callable[[StepInputs], torch.Tensor]


class Graph(Protocol):
    """Captured work. A replay computes on what the buffers that it was captured over hold now."""

    def replay(self) -> torch.Tensor:
        """The output, which the next replay overwrites."""
        ...


Capture = Callable[[Callable[[], torch.Tensor]], Graph]


def capture_sizes(max_seqs: int, limit: int = 512) -> list[int]:
    """Batch sizes to capture: 1, 2 and 4, every eighth up to 256, every sixteenth beyond, and the largest itself."""
    largest = min(max_seqs, limit)
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, limit + 1, 16)]
    return sorted({*(size for size in sizes if size <= largest), largest})


class DecodeGraphs:
    """Graphs over one InputBatch, a size each; a step that fits none is computed eagerly by whoever asks.

    Args:
        sizes: in rising order.
        compute: what to capture.
    """

    def __init__(self, inputs: InputBatch, sizes: Sequence[int], compute: Compute, capture: Capture) -> None:
        self._inputs = inputs
        self._sizes = list(sizes)
        # The largest first: the others then fit the memory that it took.
        self._graphs = {
            size: capture(lambda size=size: compute(inputs.padded(size)))  # type: ignore[misc]
            for size in reversed(self._sizes)
        }

    def size_for(self, output: SchedulerOutput) -> int | None:
        """The smallest captured batch that this step fits, or None: too many sequences, or one computes more tokens."""
        num_seqs = len(output.scheduled)
        if num_seqs == 0 or num_seqs > self._sizes[-1] or output.num_tokens != num_seqs:
            return None
        return self._sizes[bisect.bisect_left(self._sizes, num_seqs)]

    def run(self, output: SchedulerOutput, size: int, feed: Callable[[StepInputs], None]) -> torch.Tensor:
        """Logits of a step, of `size` rows, the first ones its sequences'. `feed` puts awaited tokens in."""
        feed(self._inputs.fill_padded(output, size))
        return self._graphs[size].replay()


class CudaCapture:
    """Captures CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle, whose type its versions name differently

    def __call__(self, run: Callable[[], torch.Tensor]) -> Graph:
        # What happens on a first call (kernels loaded, library handles made) cannot be captured.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread asks after its work meanwhile, which must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._pool = graph.pool()
        return _CudaGraph(graph, output)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph = graph
        self._output = output

    def replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._output
