"""The paper's figures, one a file, in the paper's order."""

from benchmarks.paper.figure import Figure
from benchmarks.paper.figures import (
    check_cpu,
    fig02_memory,
    fig12_latency,
    fig13_batched,
    fig14_sharing,
    fig15_savings,
    fig16_prefix,
    fig17_chatbot,
    fig18_blocks,
    fig19_preemption,
    sensitivity,
)

FIGURES: tuple[Figure, ...] = tuple(
    module.FIGURE
    for module in (
        fig02_memory,
        fig12_latency,
        fig13_batched,
        fig14_sharing,
        fig15_savings,
        fig16_prefix,
        fig17_chatbot,
        sensitivity,
        fig18_blocks,
        fig19_preemption,
        check_cpu,
    )
)

__all__ = ["FIGURES"]
