from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.kernels import select_backend
from engine.kernels.library import LIBRARY_PATH_VARIABLE


@pytest.mark.usefixtures("cpu")
def test_auto_takes_the_cpu_library() -> None:
    assert select_backend("auto", "cpu", 1).name == "cpu"
    assert select_backend("cpu", "cpu", 1).name == "cpu"


def test_auto_without_a_library_is_the_reference_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(LIBRARY_PATH_VARIABLE, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", "cpu", 1).name == "reference"
    assert "does not exist" in caplog.text
    with pytest.raises(ConfigError, match="does not exist"):
        select_backend("cpu", "cpu", 1)


def test_reference_runs_anywhere() -> None:
    assert select_backend("reference", "cpu", 1).name == "reference"
    assert select_backend("reference", "cuda:1", 1).name == "reference"


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("triton", "cpu", "kernels='triton' must be one of"),
        ("cuda", "cpu", "kernels='cuda' cannot run on device='cpu'"),
        ("cpu", "cuda:0", "kernels='cpu' cannot run on device='cuda:0'"),
        ("auto", "tpu", "device='tpu'"),
    ],
)
def test_refuses_what_cannot_be(name: str, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_backend(name, device, 1)
