from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelError, KernelsUnavailableError


@pytest.fixture(scope="session")
def cpu_kernels() -> CpuBackend:
    try:
        return CpuBackend(1)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, cpu_kernels: CpuBackend) -> Iterator[str]:
    """Each instruction set that this machine has, in turn that of the whole process."""
    best = cpu_kernels.isa
    try:
        cpu_kernels.set_isa(request.param)
    except KernelError as error:
        pytest.skip(str(error))
    yield request.param
    cpu_kernels.set_isa(best)
