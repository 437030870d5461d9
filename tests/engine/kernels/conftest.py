from __future__ import annotations

import pytest

from engine.kernels.cpu import CpuBackend


@pytest.fixture
def backend(cpu: CpuBackend, isa: str) -> CpuBackend:
    """The CPU kernels on each instruction set that this machine has."""
    assert cpu.isa == isa
    return cpu
