"""Triton's interpreter in a process of its own: Triton interprets all kernels or none, from when it is imported.

python -m tests.engine.kernels.triton.interpreter     frames of (backend, method, arguments) → results
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import torch

from engine.kernels.adapter_products import AdapterRun, Factors, cut_tiles
from engine.kernels.backend import AttentionMetadata
from engine.kernels.quantized_products import QuantizedRows

_ROOT = Path(__file__).parents[4]
ROW_KERNELS = "rows"
ADAPTERS = "adapters"
_LENGTH = struct.Struct("<Q")


class Interpreter:
    """The process, and calls to the backends in it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )

    def call(self, backend: bool | str, method: str, arguments: tuple[Any, ...]) -> Any:
        """A method on these tensors, of a TritonBackend that is or is not batch-invariant, or of ROW_KERNELS; what it
        writes outside of its result is written to them too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _send(self._process.stdin, (backend, method, arguments))
        result, written = _receive(self._process.stdout)
        if isinstance(result, Exception):
            raise result
        for mine, theirs in zip(arguments, written, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.untyped_storage().copy_(theirs.untyped_storage())
        return result

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()


class InterpretedBackend:
    """KernelBackend over the TritonBackend in the interpreter's process."""

    name = "interpreted triton"

    def __init__(self, interpreter: Interpreter, batch_invariant: bool) -> None:
        self._interpreter = interpreter
        self._batch_invariant = batch_invariant

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._call("linear", x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._call("rms_norm", x, weight, eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._call("add_rms_norm", x, residual, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return self._call("layer_norm", x, weight, bias, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._call("silu_and_mul", gate_up)

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
        self._call("rotate_and_cache", query, key, value, cos_sin, key_cache, value_cache, metadata)

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        return self._call("paged_attention", query, key_cache, value_cache, metadata, scale, sliding_window)

    def copy_blocks(self, kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
        self._call("copy_blocks", kv_pool, pairs)

    def _call(self, method: str, *arguments: Any) -> torch.Tensor:
        result: torch.Tensor = self._interpreter.call(self._batch_invariant, method, arguments)
        return result


class InterpretedRowKernels:
    """RowKernels over the TritonRowKernels in the interpreter's process."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter

    def quantize_rows(self, x: torch.Tensor, code_type: torch.dtype, least_rows: int) -> QuantizedRows:
        rows: QuantizedRows = self._interpreter.call(ROW_KERNELS, "quantize_rows", (x, code_type, least_rows))
        return rows

    def scale_products(
        self,
        products: torch.Tensor,
        row_scales: torch.Tensor,
        channel_scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        arguments = (products, row_scales, channel_scales, bias, dtype)
        result: torch.Tensor = self._interpreter.call(ROW_KERNELS, "scale_products", arguments)
        return result


class AdapterCalls:
    """TritonAdapterProducts in one call, as its tables hold addresses of its own process."""

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        parts: list[slice],
        slots: dict[int, list[Factors | None]],
        runs: list[AdapterRun],
    ) -> None:
        """Load the slots, in an order in which the tables grow, and add."""
        from engine.kernels.triton.adapters import TritonAdapterProducts

        products = TritonAdapterProducts(parts, torch.device("cpu"))
        for slot, factors in slots.items():
            products.load(slot, factors)
        products.add_to(y, x, cut_tiles(runs, products.tile_rows, torch.device("cpu")))


def _send(stream: IO[bytes], value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)  # unlike pickle, it keeps views of one storage together
    stream.write(_LENGTH.pack(buffer.tell()) + buffer.getvalue())
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError("the interpreter's process has ended")
    return torch.load(io.BytesIO(stream.read(_LENGTH.unpack(header)[0])), weights_only=False)


def _multiply_in_order(_builder: object, a: Any, b: Any, total: Any, *_options: object) -> Any:
    """tl.dot as a tensor core computes it: products are added in the order of K, for each lane alike. numpy, which
    the interpreter takes, rounds a row at the edge of a BLAS library's tiles otherwise than one inside."""
    from triton.runtime.interpreter import TensorHandle

    result = total.data.copy()
    for k in range(a.data.shape[1]):
        result += a.data[:, k, None].astype(result.dtype) * b.data[k].astype(result.dtype)
    return TensorHandle(result, total.dtype.scalar)


def _let_scalars_count() -> None:
    """Triton 3.6 makes an int of an array of one value, which numpy refuses from 2.5 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_count


def _serve() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    from engine.kernels.triton import TritonBackend
    from engine.kernels.triton.quantized_rows import TritonRowKernels

    InterpreterBuilder.create_dot = _multiply_in_order
    _let_scalars_count()
    torch.set_num_threads(1)
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    backends: dict[bool | str, Any] = {invariant: TritonBackend(invariant) for invariant in (False, True)}
    backends[ROW_KERNELS] = TritonRowKernels()
    backends[ADAPTERS] = AdapterCalls()
    while True:
        try:
            backend, method, arguments = _receive(stdin)
        except EOFError:
            return
        try:
            result = getattr(backends[backend], method)(*arguments)
        except Exception as error:
            result = error
        _send(stdout, (result, arguments))


if __name__ == "__main__":
    _serve()
