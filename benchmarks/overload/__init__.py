"""Admission under overload: `python -m benchmarks.overload`."""
