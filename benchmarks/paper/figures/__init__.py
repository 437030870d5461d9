"""The paper's figures, one a file, in the paper's order."""

from benchmarks.paper.figure import Figure
from benchmarks.paper.figures import fig02_memory, fig12_latency, fig13_batched

FIGURES: tuple[Figure, ...] = (fig02_memory.FIGURE, fig12_latency.FIGURE, fig13_batched.FIGURE)

__all__ = ["FIGURES"]
