"""What all tests share: the async backend, a cache of their own, and the one reason to skip for want of a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Async tests are marked `anyio` and run on asyncio, as the application does."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def cache_home() -> Iterator[Path]:
    """An empty cache for this run, its processes included: packed weights of an older build must not be found, and
    gigabytes of them must not outlast the run, in the user's home or among pytest's kept folders."""
    with tempfile.TemporaryDirectory(prefix="quire-cache-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield Path(folder)


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """Serve kills a proxy that is not ready after five seconds, and fails to start: tests run beside compilers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes (`-n`) share out whole files."""
    from tests.distribution import FileScheduling  # its base is of pytest-xdist, which runs in one process do without

    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first, and skip what is marked `gpu` where torch sees no CUDA device."""
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, "csrc" not in item.path.parts))
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # only now: some test runs have no need of it

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
