"""The engine's own steps, alone; what ranks exchange follows from the model."""

from __future__ import annotations

from benchmarks.parallel.real import exchanged_bytes
from engine.loading import open_checkpoint


def test_bytes_of_a_decode_step() -> None:
    model = open_checkpoint("dummy:smollm2-135m").model_config()
    assert exchanged_bytes(model, 1, 32) == 0
    assert exchanged_bytes(model, 2, 1) == 4 * (61 * 576 + 49152)
    assert exchanged_bytes(model, 3, 32) == 32 * exchanged_bytes(model, 2, 1)
