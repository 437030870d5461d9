"""Autoscaling under a load that rises, bursts and falls: `python -m benchmarks.elastic`."""
