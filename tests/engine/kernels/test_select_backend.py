from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels import select_backend
from engine.kernels.library import LIBRARY_PATH_VARIABLE, KernelsUnavailableError
from engine.kernels.reference import ReferenceBackend


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
        (
            "reference",
            "cuda",
            "needs kernels='auto', 'cuda' or 'triton' on a GPU, not 'reference'",
        ),
    ],
)
def test_not_all_kernels_are_batch_invariant(name: str, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_backend(name, device, 1, batch_invariant=True)


class FakeTriton(ReferenceBackend):
    name = "triton"

    def __init__(self, batch_invariant: bool = False) -> None:
        self.batch_invariant = batch_invariant


class FakeCuda(ReferenceBackend):
    name = "cuda"

    def __init__(self, batch_invariant: bool = False) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "has_library", "head_dim", "expected"),
    [
        ("auto", True, None, "both"), ("auto", True, 128, "both"), ("cuda", True, 64, "both"),
        ("auto", False, None, "triton"), ("auto", True, 16, "triton"), ("triton", True, 128, "triton"),
    ],
)  # fmt: skip
def test_batch_invariance_joins_the_library_and_triton(
    monkeypatch: pytest.MonkeyPatch, name: str, has_library: bool, head_dim: int | None, expected: str
) -> None:
    """Where both are there; and Triton alone where the library is not, or has no heads of this size."""

    class Both(FakeCuda):
        def __init__(self, triton: FakeTriton) -> None:
            assert triton.batch_invariant
            if not has_library:
                raise KernelsUnavailableError("no library")

    monkeypatch.setattr("engine.kernels.triton.TritonBackend", FakeTriton)
    monkeypatch.setattr("engine.kernels.invariant.InvariantCudaBackend", Both)
    backend = select_backend(name, "cuda", 0, batch_invariant=True, head_dim=head_dim)
    assert type(backend).__name__ == {"both": "Both", "triton": "FakeTriton"}[expected]
    if not has_library:
        with pytest.raises(ConfigError, match="no library"):
            select_backend("cuda", "cuda", 0, batch_invariant=True)


def test_auto_takes_no_kernels_without_the_models_heads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.kernels.triton.TritonBackend", FakeTriton)
    monkeypatch.setattr("engine.kernels.cuda.CudaBackend", FakeCuda)
    assert select_backend("auto", "cuda", 0, head_dim=128).name == "cuda"
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", "cuda", 0, head_dim=112).name == "triton"
    assert "no head_dim=112" in caplog.text
