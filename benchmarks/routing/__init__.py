"""Balancing policies on a fleet that is simulated around the balancer's own code: `python -m benchmarks.routing`."""
