from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelLibrary, KernelsUnavailableError
from tests.engine.parallel.ranks import RankProcesses


@pytest.fixture(scope="session")
def library() -> KernelLibrary:
    try:
        return CpuBackend(1).library
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="package")
def processes() -> Iterator[RankProcesses]:
    before = torch.get_num_threads()
    ranks = RankProcesses()
    yield ranks
    ranks.close()
    torch.set_num_threads(before)
