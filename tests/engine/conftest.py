from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelError, KernelsUnavailableError


@pytest.fixture(scope="session")
def cpu() -> CpuBackend:
    """The CPU kernels on two threads, on the best instruction set."""
    try:
        return CpuBackend(2)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest, cpu: CpuBackend) -> Iterator[str]:
    """Each instruction set that this machine has, in turn that of the whole process."""
    best = cpu.isa
    try:
        cpu.set_isa(request.param)
    except KernelError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.set_isa(best)
