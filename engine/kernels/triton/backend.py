"""KernelBackend in Triton: checks the tensors, then launches."""

from __future__ import annotations

import torch
import triton
from torch.nn import functional

from engine.kernels.backend import AttentionMetadata
from engine.kernels.checks import TensorChecks, check_num_rows
from engine.kernels.gpu import find_gpu
from engine.kernels.library import KernelError
from engine.kernels.triton.attention import PagedAttention
from engine.kernels.triton.copy_blocks import launch_copy_blocks
from engine.kernels.triton.layer_norm import launch_layer_norm
from engine.kernels.triton.matmul import launch_matmul
from engine.kernels.triton.rms_norm import launch_rms_norm
from engine.kernels.triton.rotate_and_cache import launch_rotate_and_cache
from engine.kernels.triton.silu_and_mul import launch_silu_and_mul

_INTERPRETED_PROCESSORS = 4


class TritonBackend(TensorChecks):
    """Kernels for NVIDIA GPUs of compute capability 8.0 and later; float32, bfloat16 and float16. Any even head
    dimension (padded to a power of two), any number of query heads to a KV head.

    They belong to the device that is torch's current one when the backend is made, and are compiled when first used.
    Values in device memory (slots, lengths, block ids) are trusted. In Triton's interpreter they run on the CPU.

    Args:
        batch_invariant: matrix products and attention sum in one order whatever the batch, at a cost: a row's results
            are bitwise the same alone, in a batch and in chunks. Norms are so anyway.

    Raises:
        KernelsUnavailableError: there is no usable GPU.
    """

    name = "triton"

    def __init__(self, batch_invariant: bool = False) -> None:
        device, num_processors = _find_device()
        super().__init__(device)
        self._batch_invariant = batch_invariant
        self._attend = PagedAttention(device, num_processors, batch_invariant)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self._batch_invariant:
            return functional.linear(x, weight, bias)
        self.check_linear(x, weight, bias)
        return launch_matmul(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        self.check_norm(x, weight)
        rows = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])  # heads keep the strides of a fused projection
        return launch_rms_norm(rows, None, weight, eps).view(x.shape)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        self.check_norm(x, weight, residual)
        return launch_rms_norm(x.unsqueeze(1), residual, weight, eps).view(x.shape)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        self.check("x", x, x.dtype, ndim=2)
        for what, vector in (("weight", weight), ("bias", bias)):
            self.check(what, vector, x.dtype, ndim=1)
            if vector.shape[0] != x.shape[1]:
                raise KernelError(f"{what} has {vector.shape[0]} elements, x has rows of {x.shape[1]}")
        return launch_layer_norm(x, weight, bias, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        self.check_gate_up(gate_up)
        return launch_silu_and_mul(gate_up)

    def rotate_and_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor | None,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        self.check_rotation(query, key, value, cos_sin, key_cache, value_cache)
        self._check_batch(query, key_cache, metadata)
        launch_rotate_and_cache(query, key, value, cos_sin, key_cache, value_cache, metadata)

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        self.check_attention(query, key_cache, value_cache, sliding_window)
        self._check_batch(query, key_cache, metadata)
        return self._attend(query, key_cache, value_cache, metadata, scale, sliding_window)

    def copy_blocks(self, kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
        self.check_copy(kv_pool, pairs)
        launch_copy_blocks(kv_pool, pairs)

    def _check_batch(self, query: torch.Tensor, key_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
        self.check_groups(query, key_cache)
        self.check_metadata(metadata)
        check_num_rows(metadata, query.shape[0])


def _find_device() -> tuple[torch.device, int]:
    """The device to run on, and how many multiprocessors it has."""
    if triton.knobs.runtime.interpret:
        return torch.device("cpu"), _INTERPRETED_PROCESSORS
    device = find_gpu("triton")
    return device, int(torch.cuda.get_device_properties(device).multi_processor_count)
