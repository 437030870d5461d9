"""libquire_cuda.so where there is no GPU: it loads, checks its arguments, and ptxas found registers for all of it."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from engine.kernels import abi, cuda_abi
from engine.kernels.cuda import CudaBackend
from engine.kernels.library import KernelError, KernelLibrary, KernelsUnavailableError, load_library

PTXAS_LOG = Path(__file__).parents[2] / "build" / "native" / "libquire_cuda.ptxas"
NO_NVCC = "there is no nvcc, so the CUDA library was not built"
OPERATIONS = abi.OPERATIONS | cuda_abi.OPERATIONS
SOMEWHERE = 1 << 20  # an address that no refused call may touch


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    loaded = load_library("cuda")
    if loaded.library is None and shutil.which("nvcc") is None:
        pytest.skip(NO_NVCC)
    assert loaded.library is not None, loaded.reason
    return loaded.library


def filled(operation: str) -> abi.Params:
    """A struct that passes every check that needs no device."""
    params = OPERATIONS[operation]()
    for name, kind, *_ in params._fields_:
        if kind is ctypes.c_void_p and name not in ("stream", "workspace"):
            setattr(params, name, SOMEWHERE)
        elif kind in (ctypes.c_int32, ctypes.c_int64) and name not in (
            "num_threads",
            "reserved",
            "sliding_window",
            "split_tokens",
        ):
            setattr(params, name, 64)
        elif kind is abi.CacheView:
            setattr(params, name, abi.CacheView(SOMEWHERE, 4096, 1024, 64))
    for name in ("dtype", "cache_dtype"):
        if hasattr(params, name):
            setattr(params, name, 0)
    if isinstance(params, cuda_abi.SwapBlocksParams):
        params.stream, params.to_host, params.method = SOMEWHERE, 1, cuda_abi.SWAP_COPY_ENGINE
    return params


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_checks_struct_version_and_threads(library: KernelLibrary, operation: str) -> None:
    for field, value, message in (
        ("size", 8, "params has size 8"),
        ("abi_version", 99, "ABI version 99"),
        ("num_threads", 2, "num_threads=2 must be 0 on CUDA"),
    ):
        params = filled(operation)
        setattr(params, field, value)
        with pytest.raises(KernelError, match=message):
            library.call(operation, params)


@pytest.mark.parametrize(
    ("operation", "field", "value", "message"),
    [
        ("rms_norm", "dtype", 7, "dtype=7 is no QuireDType"),
        ("rms_norm", "num_groups", 0, "num_groups=0"),
        ("rms_norm", "weight", None, "x, weight or out is null"),
        ("rms_norm", "eps", -1.0, "eps=-1 must not be negative"),
        ("add_rms_norm", "dim", 0, "dim=0"),
        ("add_rms_norm", "residual_row_stride", 63, "residual_row_stride=63 is below dim=64"),
        ("add_rms_norm", "reserved", 1, "reserved=1"),
        ("silu_and_mul", "num_rows", -1, "num_rows=-1"),
        ("silu_and_mul", "out", None, "gate_up or out is null"),
        ("rotate_and_cache", "head_dim", 63, "head_dim=63 must be even"),
        ("rotate_and_cache", "block_size", 24, "block_size=24 must be a power of two"),
        ("rotate_and_cache", "cache_dtype", -1, "cache_dtype=-1 is no QuireDType"),
        ("rotate_and_cache", "positions", None, "cos_sin or positions is null"),
        ("paged_attention", "num_kv_heads", 48, "num_heads=64 must be a positive multiple of num_kv_heads=48"),
        ("paged_attention", "head_dim", 66, "head_dim=66; the CUDA kernels have"),
        ("paged_attention", "block_size", 512, "block_size=512"),
        ("paged_attention", "sliding_window", -1, "sliding_window=-1"),
        ("paged_attention", "split_tokens", 32, "split_tokens=32 must be 0 or a positive multiple of 64"),
        ("paged_attention", "max_seq_len", 4097, "max_seq_len=4097 does not fit in max_blocks=64 blocks of 64"),
        ("paged_attention", "seq_lens", None, "seq_lens or block_tables is null"),
        ("paged_attention", "key_cache", abi.CacheView(SOMEWHERE + 4, 4096, 1024, 64), "multiples of 16 bytes"),
        ("paged_attention", "value_cache", abi.CacheView(SOMEWHERE, 4096, 1024, 66), r"slots \(66\), at multiples"),
        ("paged_attention", "value_cache", abi.CacheView(None, 4096, 1024, 64), "value_cache is null"),
        ("copy_blocks", "block_bytes", 0, "block_bytes=0"),
        ("copy_blocks", "pairs", None, "pool or pairs is null"),
        ("sample", "vocab_size", (1 << 18) + 1, "vocab_size=262145 must be from 1 to 262144"),
        ("sample", "logits_row_stride", 63, "logits_row_stride=63 is below vocab_size=64"),
        ("sample", "max_candidates", 65, "max_candidates=65"),
        ("sample", "draws", None, "logits, draws or drawn is null"),
        ("swap_blocks", "stream", None, "stream is null"),
        ("swap_blocks", "to_host", 2, "to_host=2"),
        ("swap_blocks", "method", 2, "method=2 is no QuireSwapMethod"),
        ("swap_blocks", "host_pool", None, "device_pool, host_pool or pairs is null"),
    ],
)
def test_refuses_arguments(library: KernelLibrary, operation: str, field: str, value: object, message: str) -> None:
    params = filled(operation)
    setattr(params, field, value)
    with pytest.raises(KernelError, match=message):
        library.call(operation, params)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - {"swap_blocks"}))  # which reads its pairs here
def test_without_a_gpu_a_sound_call_reports_the_runtime(library: KernelLibrary, operation: str) -> None:
    """Also shows that `filled` passes the argument checks, so that the tests above fail for the field they set."""
    with pytest.raises(KernelError, match=r"\(cudaError\w+\)"):
        library.call(operation, filled(operation))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.usefixtures("library")
def test_without_a_gpu_the_backend_says_so() -> None:
    with pytest.raises(KernelsUnavailableError, match="torch sees no CUDA device"):
        CudaBackend()


def test_no_kernel_spills_registers() -> None:
    """A spill in an inner loop costs more than any other slip, and shows in no test of numbers."""
    if not PTXAS_LOG.is_file():
        if shutil.which("nvcc") is None:
            pytest.skip(NO_NVCC)
        pytest.fail(f"{PTXAS_LOG.name} is not there: run `make build`")
    entry = ""
    kernels, spilling = set(), []
    for line in PTXAS_LOG.read_text().splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry = f"{match[1]} for {match[2]}"
            kernels.add(entry)
        elif (match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and match[0][0] != "0":
            spilling.append(f"{entry}: {match[0]}")
    attention = ("paged_attention", "decode_attention", "prefill_attention", "merge_shares", "merge_splits")
    for name in ("rms_norm", "silu_and_mul", "rotate_and_cache", "copy_blocks", *cuda_abi.OPERATIONS, *attention):
        for architecture in ("sm_80", "sm_90a"):
            assert any(f"{name}_kernel" in kernel and kernel.endswith(architecture) for kernel in kernels), name
    assert spilling == []
