"""Routers compared on real Serve applications with simulated devices: `python -m benchmarks.fleet`."""
