from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

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
        ("opencl", "cpu", "kernels='opencl' must be one of auto, reference, cpu, cuda, triton"),
        ("triton", "cpu", "kernels='triton' cannot run on device='cpu'"),
        ("cuda", "cpu", "kernels='cuda' cannot run on device='cpu'"),
        ("cpu", "cuda:0", "kernels='cpu' cannot run on device='cuda:0'"),
        ("auto", "tpu", "device='tpu'"),
    ],
)
def test_refuses_what_cannot_be(name: str, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_backend(name, device, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_tries_cuda_then_triton_and_says_what_was_wrong_with_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", "cuda", 1).name == "reference"
    assert "doing without kernels=cuda: the cuda kernels are not available" in caplog.text
    assert "doing without kernels=triton: the triton kernels are not available" in caplog.text
    with pytest.raises(ConfigError, match="the triton kernels are not available"):
        select_backend("triton", "cuda", 1)


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("auto", "cpu", "batch_invariant=True on a CPU needs the native engine"),
        ("reference", "cpu", "batch_invariant=True on a CPU needs the native engine"),
        ("cuda", "cuda", "batch_invariant=True needs kernels='triton' or 'auto' on a GPU, not 'cuda'"),
        ("reference", "cuda", "not 'reference'"),
    ],
)
def test_only_triton_is_batch_invariant(name: str, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_backend(name, device, 1, batch_invariant=True)
