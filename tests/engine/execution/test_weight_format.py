"""Who takes which `quantization`, and what a refusal says."""

from __future__ import annotations

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution.weight_format import choose_weight_format
from engine.kernels.quantized_products import TorchRowKernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a GPU that is made up; a test may change it."""
    version = [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: tuple(version))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    return version


def test_auto_and_none_hold_the_type() -> None:
    for name in ("auto", "none"):
        assert choose_weight_format(EngineConfig.from_dict({"quantization": name}), CPU, torch.float32) is None


@pytest.mark.usefixtures("capability")
def test_int8_may_be_batch_invariant_and_fp8_may_not() -> None:
    options = {"batch_invariant": True, "kernels": "reference"}
    chosen = choose_weight_format(EngineConfig.from_dict(options | {"quantization": "int8"}), GPU, torch.float16)
    assert chosen is not None
    assert chosen.code_type == torch.int8
    assert isinstance(chosen.kernels, TorchRowKernels)
    with pytest.raises(ConfigError, match="quantization='fp8' cannot be batch_invariant"):
        choose_weight_format(EngineConfig.from_dict(options | {"quantization": "fp8"}), GPU, torch.bfloat16)


def test_fp8_names_the_gpu_that_cannot(capability: list[int]) -> None:
    config = EngineConfig(quantization="fp8")
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 or later, not NVIDIA A100 with 8\.0"):
        choose_weight_format(config, GPU, torch.bfloat16)
    capability[:] = [8, 9]
    with pytest.raises(ConfigError, match="quantization='fp8' needs dtype='bfloat16', not 'float16'"):
        choose_weight_format(config, GPU, torch.float16)
    pytest.importorskip("triton", reason="Triton is not installed")
    from engine.kernels.triton.quantized_rows import TritonRowKernels

    chosen = choose_weight_format(config, GPU, torch.bfloat16)
    assert chosen is not None
    assert isinstance(chosen.kernels, TritonRowKernels)


@pytest.mark.parametrize(
    ("kernels", "quantization", "message"),
    [("reference", "native", "'native' needs the native CPU engine"), ("native", "fp8", "'fp8' needs torch")],
)
def test_each_engine_names_the_other(kernels: str, quantization: str, message: str) -> None:
    config = EngineConfig.from_dict({"kernels": kernels, "quantization": quantization, "device": "cpu"})
    with pytest.raises(ConfigError, match=f"quantization={message}"):
        LLMEngine.from_options("dummy:tiny", config)
