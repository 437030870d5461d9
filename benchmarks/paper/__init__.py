"""The evaluation of the PagedAttention paper (arXiv 2309.06180, §6 and §7), redrawn: `python -m benchmarks.paper`."""
