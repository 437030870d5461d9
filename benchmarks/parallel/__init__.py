"""What tensor parallelism costs and brings, by the number of ranks: `python -m benchmarks.parallel`."""
