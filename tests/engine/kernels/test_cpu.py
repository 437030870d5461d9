"""The CPU kernels but attention, against the reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels import abi
from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelError
from engine.kernels.reference import ReferenceBackend
from tests.engine.kernels.cases import assert_rounds_to, make_metadata, make_pool

DTYPES = (torch.float32, torch.bfloat16)
DIMS = (1, 7, 16, 100, 576, 4096)
EPS = 1e-5

reference = ReferenceBackend()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm(backend: CpuBackend, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    x, weight = torch.randn(33, dim).to(dtype), torch.randn(dim).to(dtype)
    assert_rounds_to(backend.rms_norm(x, weight, EPS), reference.rms_norm(x.double(), weight.double(), EPS))


def test_rms_norm_of_heads_inside_a_fused_projection(backend: CpuBackend) -> None:
    torch.manual_seed(0)
    heads = torch.randn(5, 12, 24)[:, 1:9]
    weight = torch.randn(24)
    out = backend.rms_norm(heads, weight, EPS)
    assert out.is_contiguous()
    assert_rounds_to(out, reference.rms_norm(heads.double(), weight.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_add_rms_norm(backend: CpuBackend, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    x, weight = torch.randn(33, dim).to(dtype), torch.randn(dim).to(dtype)
    residual = torch.randn(33, dim).to(dtype)
    expected = (residual.float() + x.float()).to(dtype)
    out = backend.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, expected)
    assert_rounds_to(out, reference.rms_norm(expected.double(), weight.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_silu_and_mul(backend: CpuBackend, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    gate_up = (torch.randn(33, 2 * dim) * 8).to(dtype)
    assert_rounds_to(backend.silu_and_mul(gate_up), reference.silu_and_mul(gate_up.double()))


def test_silu_at_the_ends_of_the_range(backend: CpuBackend) -> None:
    gate = torch.tensor([[-3e38, -1000.0, -89.0, -87.5, -0.0, 0.0, 20.0, 89.0, 1000.0, float("inf"), float("nan")]])
    out = backend.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(out[0, 5:-1], gate[0, 5:-1], rtol=1e-6, atol=0.0)
    assert (out[0, 1:5].abs() < 1e-35).all()
    assert -4.0 < out[0, 0] <= 0.0
    assert out[0, -1].isnan()


def test_bfloat16_results_round_to_nearest_even(backend: CpuBackend) -> None:
    """Adding 0 rounds every pattern: ties both ways, the largest finite values, infinities and NaN."""
    residual = torch.tensor([1.0, 1.0078125, -1.0, 3.3895e38, float("inf"), float("nan"), 0.0]).bfloat16().repeat(5)
    x = torch.tensor([2**-8, 2**-8, -(2**-8), 3e35, 1.0, 1.0, 2**-133]).bfloat16().repeat(5)
    expected = (residual.float() + x.float()).bfloat16()
    weight = torch.ones(len(x), dtype=torch.bfloat16)
    residual = residual.unsqueeze(0)
    backend.add_rms_norm(x.unsqueeze(0), residual, weight, EPS)
    assert torch.equal(residual[0].nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


def rotary_table(num_positions: int, head_dim: int) -> torch.Tensor:
    angles = torch.arange(num_positions)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_rotate_and_cache(
    backend: CpuBackend, block_size: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    torch.manual_seed(head_dim)
    num_heads, num_kv_heads = 9, 3
    metadata = make_metadata([(13, 13), (1, 40), (5, 33)], block_size, num_blocks=100)
    metadata.slot_mapping[4] = -1
    num_tokens = len(metadata.positions)
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    query, key, value = torch.split(fused, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    rotated, rotated_key, untouched = query.double(), key.double(), value.double()
    cos_sin = rotary_table(64, head_dim)
    pool = make_pool(100, num_kv_heads, block_size, head_dim, cache_dtype).fill_(7.0)
    expected_pool = pool.clone()

    backend.rotate_and_cache(query, key, value, cos_sin, pool[:, 1, 0], pool[:, 1, 1], metadata)

    scratch = make_pool(100, num_kv_heads, block_size, head_dim, torch.float64)
    reference.rotate_and_cache(
        rotated, rotated_key, untouched, cos_sin.double(), scratch[:, 1, 0], scratch[:, 1, 1], metadata
    )
    assert_rounds_to(query, rotated)
    assert_rounds_to(key, rotated_key)
    assert torch.equal(value.double(), untouched)
    # The cache holds the stored key and value exactly, and nothing else of the pool has changed: not the other layer,
    # not the slots of other tokens, not the slot of the padding row.
    for token, slot in enumerate(metadata.slot_mapping.tolist()):
        if slot >= 0:
            expected_pool[slot // block_size, 1, 0, :, slot % block_size] = key[token].to(cache_dtype)
            expected_pool[slot // block_size, 1, 1, :, slot % block_size] = value[token].to(cache_dtype)
    assert torch.equal(pool, expected_pool)


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_cache_without_rotation(
    backend: CpuBackend, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """Query and key stay as they are, and no position is looked at."""
    torch.manual_seed(head_dim)
    metadata = make_metadata([(13, 13), (1, 40)], block_size=16, num_blocks=10)
    metadata.slot_mapping[4] = -1
    metadata.positions.fill_(1 << 40)
    fused = torch.randn(14, 4 + 2 + 2, head_dim).to(dtype)
    before = fused.clone()
    query, key, value = torch.split(fused, [4, 2, 2], dim=1)
    pool = make_pool(10, 2, 16, head_dim, cache_dtype).fill_(7.0)
    expected = pool.clone()
    backend.rotate_and_cache(query, key, value, None, pool[:, 1, 0], pool[:, 1, 1], metadata)
    reference.rotate_and_cache(query, key, value, None, expected[:, 1, 0], expected[:, 1, 1], metadata)
    assert torch.equal(fused, before)
    assert torch.equal(pool, expected)
    assert (pool != 7.0).sum() == 13 * 2 * 2 * head_dim


def test_rotation_and_none_take_turns(cpu: CpuBackend) -> None:
    """The structs are kept between calls: a table must not linger in them."""
    metadata = make_metadata([(3, 3)], block_size=16, num_blocks=2)
    pool = torch.zeros(2, 1, 2, 2, 16, 8)
    caches = pool[:, 0, 0], pool[:, 0, 1]
    heads = [torch.ones(3, 2, 8) for _ in range(3)]
    cpu.rotate_and_cache(heads[0], heads[1], heads[2], rotary_table(9, 8), *caches, metadata)
    rotated = heads[0].clone()
    assert not torch.equal(rotated, torch.ones(3, 2, 8))
    cpu.rotate_and_cache(heads[0], heads[1], heads[2], None, *caches, metadata)
    assert torch.equal(heads[0], rotated)
    cpu.rotate_and_cache(heads[0], heads[1], heads[2], rotary_table(9, 8), *caches, metadata)
    assert not torch.equal(heads[0], rotated)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_copy_blocks_in_order(num_threads: int) -> None:
    """A chain copies what the pair before has written; a block on itself stays."""
    backend = CpuBackend(num_threads)
    torch.manual_seed(0)
    pool = torch.randn(6, 3, 2, 4, 16, 129)  # 198,144 bytes a block: several work items, the last one short
    expected = pool.clone()
    pairs = torch.tensor([[0, 1], [1, 2], [3, 1], [4, 4], [2, 5]])
    reference.copy_blocks(expected, pairs)
    backend.copy_blocks(pool, pairs)
    assert torch.equal(pool, expected)
    assert torch.equal(pool[5], pool[0])


def test_no_rows_are_no_work(cpu: CpuBackend) -> None:
    weight = torch.ones(8)
    assert cpu.rms_norm(torch.empty(0, 8), weight, EPS).shape == (0, 8)
    assert cpu.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), weight, EPS).shape == (0, 8)
    assert cpu.silu_and_mul(torch.empty(0, 8)).shape == (0, 4)
    cpu.copy_blocks(torch.empty(2, 8), torch.empty(0, 2, dtype=torch.int64))


def test_refuses_what_does_not_fit(cpu: CpuBackend) -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(KernelError, match="weight has 7 elements, x has rows of 8"):
        cpu.rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(KernelError, match=r"weight is torch\.bfloat16, expected torch\.float32"):
        cpu.rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(KernelError, match="x has stride 2 along its last dimension"):
        cpu.rms_norm(torch.ones(8, 2).T, weight, EPS)
    with pytest.raises(KernelError, match=r"x is torch\.float64"):
        cpu.rms_norm(x.double(), weight.double(), EPS)
    with pytest.raises(KernelError, match="float16, which the CPU kernels do not have"):
        cpu.rms_norm(x.half(), weight.half(), EPS)
    with pytest.raises(KernelError, match=r"residual has shape \[3, 8\]"):
        cpu.add_rms_norm(x, torch.ones(3, 8), weight, EPS)
    with pytest.raises(KernelError, match="residual_row_stride=0"):
        cpu.add_rms_norm(x, torch.ones(1, 8).expand(2, 8), weight, EPS)
    with pytest.raises(KernelError, match="odd last dimension, 7"):
        cpu.silu_and_mul(torch.ones(2, 7))
    with pytest.raises(KernelError, match="expected 2 dimensions"):
        cpu.silu_and_mul(torch.ones(8))
    with pytest.raises(KernelError, match="x is on meta, the cpu kernels need cpu"):
        cpu.rms_norm(x.to("meta"), weight, EPS)
    with pytest.raises(KernelError, match="destination=6 must be from 0 to 5"):
        cpu.copy_blocks(torch.ones(6, 8), torch.tensor([[0, 1], [1, 6]]))
    with pytest.raises(KernelError, match="kv_pool must be contiguous"):
        cpu.copy_blocks(torch.ones(6, 8)[:, :4], torch.tensor([[0, 1]]))
    with pytest.raises(ConfigError, match="num_threads=0"):
        CpuBackend(0)
    with pytest.raises(KernelError, match='"sse9" is none of scalar, avx2, avx512, avx512_bf16'):
        cpu.set_isa("sse9")


@pytest.mark.parametrize(
    ("slot", "position", "message"), [(32, 0, "slot=32"), (-2, 0, "slot=-2"), (0, 9, "position=9")]
)
def test_rotate_refuses_indices_outside(cpu: CpuBackend, slot: int, position: int, message: str) -> None:
    metadata = make_metadata([(3, 3)], block_size=16, num_blocks=2)
    metadata.slot_mapping[1] = slot
    metadata.positions[1] = position
    heads = torch.ones(3, 2, 8)
    pool = torch.zeros(2, 1, 2, 2, 16, 8)
    with pytest.raises(KernelError, match=message):
        cpu.rotate_and_cache(heads, heads, heads, rotary_table(9, 8), pool[:, 0, 0], pool[:, 0, 1], metadata)
    assert (pool == 0.0).all()
    assert (heads == 1.0).all()


@pytest.mark.parametrize("operation", sorted(abi.OPERATIONS))
def test_the_library_checks_its_structs(cpu: CpuBackend, operation: str) -> None:
    call = cpu.library.call
    params = abi.OPERATIONS[operation]()
    with pytest.raises(KernelError, match="num_threads=0 must be from 1"):
        call(operation, params)
    params.stream = 8
    with pytest.raises(KernelError, match="stream must be NULL"):
        call(operation, params)
    params.size -= 4
    with pytest.raises(KernelError, match="bytes, the library expects"):
        call(operation, params)
    params.abi_version += 1
    with pytest.raises(KernelError, match="ABI version"):
        call(operation, params)


def test_null_pointers_are_refused(cpu: CpuBackend) -> None:
    params = abi.RmsNormParams()
    params.num_threads = params.num_rows = params.num_groups = params.dim = 1
    with pytest.raises(KernelError, match="x is NULL"):
        cpu.library.call("rms_norm", params)


@pytest.mark.parametrize(("table", "max_positions", "message"), [(0, 9, "cos_sin is NULL"), (8, 0, "max_positions=0")])
def test_a_table_and_its_length_go_together(cpu: CpuBackend, table: int, max_positions: int, message: str) -> None:
    """A caller that forgets the table must not get unrotated keys."""
    heads, slots = torch.ones(1, 1, 2), torch.zeros(1, dtype=torch.int64)
    cache = torch.zeros(1, 1, 1, 2)
    params = abi.RotateAndCacheParams()
    params.query = params.key = params.value = heads.data_ptr()
    params.slot_mapping = params.positions = slots.data_ptr()
    for view in (params.key_cache, params.value_cache):
        view.data, view.block_stride, view.head_stride, view.slot_stride = cache.data_ptr(), 2, 2, 2
    params.num_tokens = params.num_heads = params.num_kv_heads = params.num_blocks = params.block_size = 1
    params.head_dim, params.num_threads = 2, 1
    params.cos_sin, params.max_positions = table or None, max_positions
    with pytest.raises(KernelError, match=message):
        cpu.library.call("rotate_and_cache", params)
    params.cos_sin, params.max_positions = None, 0
    cpu.library.call("rotate_and_cache", params)
    assert (cache == 1.0).all()


def test_many_python_threads_call_at_once(cpu: CpuBackend) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512)
    inputs = [torch.randn(256, 512) for _ in range(4)]
    expected = [cpu.rms_norm(x, weight, EPS) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        outs = [cpu.rms_norm(inputs[i], weight, EPS) for _ in range(200)]
        wrong.extend(i for out in outs if not torch.equal(out, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import os, torch
from engine.kernels.cpu import CpuBackend
torch.set_num_threads(1)
backend = CpuBackend(2)
x, weight = torch.randn(512, 512), torch.ones(512)
expected = backend.rms_norm(x, weight, 1e-5)
child = os.fork()
if child == 0:
    same = all(torch.equal(backend.rms_norm(x, weight, 1e-5), expected) for _ in range(50))
    os._exit(0 if same else 1)
assert torch.equal(backend.rms_norm(x, weight, 1e-5), expected)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, timeout=120, capture_output=True, text=True
    )


@pytest.mark.usefixtures("cpu")
def test_works_in_a_forked_child() -> None:
    """The helpers do not survive a fork: the child must start its own rather than wait for them."""
    result = run_python(FORK)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(("isa", "message"), [("scalar", ""), ("sse9", 'QUIRE_CPU_ISA: instruction set "sse9"')])
def test_the_environment_names_the_instruction_set(isa: str, message: str) -> None:
    code = "import torch; from engine.kernels.cpu import CpuBackend; print(CpuBackend(1).isa)"
    result = run_python(code, QUIRE_CPU_ISA=isa)
    if message:
        assert result.returncode != 0
        assert message in result.stderr
    else:
        assert result.stdout.strip() == isa, result.stderr
