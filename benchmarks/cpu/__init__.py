"""The native CPU engine against other engines and against what the machine can do: `python -m benchmarks.cpu`."""
