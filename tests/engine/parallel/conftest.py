from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelLibrary, KernelsUnavailableError


@pytest.fixture(scope="session")
def library() -> KernelLibrary:
    try:
        return CpuBackend(1).library
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="package")
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
