"""What `quantization` means where torch computes, and what it asks of the device."""

from __future__ import annotations

import importlib.util
import logging

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.quantized_products import RowKernels, TorchRowKernels
from engine.layers import WeightFormat

logger = logging.getLogger(__name__)

_CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_FP8_CAPABILITY = (8, 9)


def choose_weight_format(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> WeightFormat | None:
    """None holds the weights in `dtype`.

    Raises:
        ConfigError: `quantization` is the native engine's, or not for this device, this type or batch invariance.
    """
    if config.quantization in ("auto", "none"):
        return None
    if config.quantization not in _CODE_TYPES:
        raise ConfigError(f"quantization={config.quantization!r} needs the native CPU engine")
    if config.quantization == "fp8":
        _check_fp8(config, device, dtype)
    return WeightFormat(_CODE_TYPES[config.quantization], _row_kernels(config, device))


def _check_fp8(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
    if config.batch_invariant:
        raise ConfigError(
            "quantization='fp8' cannot be batch_invariant: torch's float8 products may sum in another order for "
            "another number of rows; int8 can"
        )
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            "quantization='fp8' needs a GPU of compute capability 8.9 or later, not "
            f"{torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}; int8 needs 8.0"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(f"quantization='fp8' needs dtype='bfloat16', not {str(dtype).removeprefix('torch.')!r}")


def _row_kernels(config: EngineConfig, device: torch.device) -> RowKernels:
    if device.type != "cuda" or config.kernels == "reference":
        return TorchRowKernels()
    if importlib.util.find_spec("triton") is None:
        logger.warning("rows are quantised by torch in many small operations: pip install 'triton>=3.6'")
        return TorchRowKernels()
    from engine.kernels.triton.quantized_rows import TritonRowKernels

    return TritonRowKernels()
