"""An HTTP server under load, and what serving costs beside the engine alone: `python -m benchmarks.serving`."""
