"""Quire on a GPU, in one visit to a machine that has one: `python -m benchmarks.gpu`."""
