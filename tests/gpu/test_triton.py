"""The Triton kernels on a GPU: against the reference in float32 and the CUDA library, and bitwise batch-invariant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.kernels import select_backend
from engine.kernels.backend import AttentionMetadata, KernelBackend
from engine.kernels.library import KernelsUnavailableError
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from tests.engine.kernels.cases import DECODE, MIXED, PREFILL, PagedBatch, make_batch
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.gpu.conftest import Kernels

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
reference = ReferenceBackend()


@pytest.fixture(params=[False, True], ids=["fast", "invariant"])
def triton(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(build(request.param), "cuda")


def build(batch_invariant: bool) -> KernelBackend:
    pytest.importorskip("triton", reason="Triton is not installed")
    return select_backend("triton", "cuda", 0, batch_invariant)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The worst row's, relative to its norm."""
    return float(((actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
def test_attention(triton: Kernels, lengths: tuple[tuple[int, int], ...], head_dim: int, dtype: torch.dtype) -> None:
    for heads, sliding_window in (((9, 3), None), ((8, 2), 100)):
        batch = make_batch(lengths, heads=heads, head_dim=head_dim, dtype=dtype)
        assert error(triton.attend(batch, sliding_window), batch.exact(sliding_window)) < 8e-3


def test_attention_beside_the_cuda_kernels(triton: Kernels) -> None:
    from engine.kernels.cuda import CudaBackend

    try:
        cuda = Kernels(CudaBackend(), "cuda")
    except KernelsUnavailableError as reason:
        pytest.skip(str(reason))
    batch = make_batch(((1, 4000), (300, 2000), (1, 17)), heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    assert error(triton.attend(batch), cuda.attend(batch).double()) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_activation_and_rotation(triton: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(33, 4096).to(dtype), torch.randn(4096).to(dtype)
    out = triton.backend.rms_norm(x.cuda(), weight.cuda(), 1e-5).cpu()
    assert error(out, reference.rms_norm(x.double(), weight.double(), 1e-5)) < 4e-3
    out = triton.backend.silu_and_mul(x.cuda()).cpu()
    assert error(out, reference.silu_and_mul(x.double())) < 4e-3

    batch = make_batch(MIXED, heads=(8, 2), head_dim=128, dtype=dtype)
    heads = torch.randn(len(batch.query), 12, 128).to(dtype)
    angles = torch.rand(1000, 64) * 6.0
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    pool = torch.zeros(len(batch.key_cache), 2, 2, 16, 128, dtype=dtype)
    moved, moved_pool = heads.cuda(), pool.cuda()
    for backend, device, rows, cache in (
        (reference, "cpu", heads, pool),
        (triton.backend, "cuda", moved, moved_pool),
    ):
        query, key, value = torch.split(rows, [8, 2, 2], dim=1)
        metadata = batch.metadata if device == "cpu" else triton.metadata(batch.metadata)
        backend.rotate_and_cache(query, key, value, table.to(device), cache[:, 0], cache[:, 1], metadata)
    assert error(moved.cpu(), heads.double()) < 8e-3
    torch.testing.assert_close(moved_pool.cpu(), pool, rtol=1e-2, atol=1e-2)


def test_copy_blocks_in_order(triton: Kernels) -> None:
    expected = torch.randn(6, 3, 1025)
    pool, pairs = expected.cuda(), torch.tensor([[0, 1], [1, 2], [3, 1], [4, 4], [2, 5]])
    reference.copy_blocks(expected, pairs)
    triton.backend.copy_blocks(pool, pairs.cuda())
    assert torch.equal(pool.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_bitwise_the_same_for_any_number_of_rows(dtype: torch.dtype) -> None:
    backend = build(batch_invariant=True)
    torch.manual_seed(0)
    x, weight = torch.randn(700, 4096).to("cuda", dtype), torch.randn(6144, 4096).to("cuda", dtype)
    whole = backend.linear(x, weight, None)
    assert error(whole.cpu(), x.cpu().double() @ weight.cpu().double().T) < 8e-3
    for first, last in ((0, 1), (0, 16), (690, 700), (5, 138), (100, 700)):
        assert torch.equal(backend.linear(x[first:last], weight, None), whole[first:last]), (first, last)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_bitwise_the_same_alone_in_a_batch_and_in_chunks(dtype: torch.dtype, head_dim: int) -> None:
    kernels = Kernels(build(batch_invariant=True), "cuda")
    lengths = ((150, 3700), (1, 1100), (9, 9), (1, 64))
    batch = make_batch(lengths, heads=(8, 2), head_dim=head_dim, dtype=dtype)
    whole = kernels.attend(batch)
    starts = batch.metadata.query_start_loc.tolist()
    for seq, (num_rows, _) in enumerate(lengths):
        for chunk in (1, 7, 64):
            for first in range(0, num_rows, chunk if chunk > 1 else 29):
                last = min(first + chunk, num_rows)
                part = kernels.attend(batch.only(seq, first, last))
                assert torch.equal(part, whole[starts[seq] + first : starts[seq] + last]), (seq, first, last)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "OPTForCausalLM"])
def test_logits_are_bitwise_equal_alone_in_a_batch_and_in_chunks(architecture: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_hf(hf_model(architecture), tmp_path)))
    device = torch.device("cuda", torch.cuda.current_device())
    model = load_model(checkpoint, checkpoint.model_config(), build(True), torch.bfloat16, device)
    config = model.config
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (120,))

    def logits(lengths: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Of sequences that all are prefixes of `ids`, each computed from its first token on, in two steps."""
        batch = make_batch(
            lengths, heads=(config.num_heads, config.num_kv_heads), head_dim=config.head_dim, dtype=torch.bfloat16
        )
        shape = (len(batch.key_cache), config.num_layers, 2, config.num_kv_heads, 16, config.head_dim)
        pool = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
        rows = []
        for metadata in (before(batch), batch.metadata):
            on_device = Kernels(model_kernels, "cuda").metadata(metadata)
            hidden = model.forward(ids[metadata.positions].cuda(), pool, on_device)
            rows.append(model.compute_logits(hidden)[: int(metadata.query_start_loc[1])])
        return torch.cat(rows)

    model_kernels = build(True)
    with torch.inference_mode():
        whole = logits(((60, 120),))
        for lengths in (((1, 120),), ((119, 120),), ((60, 120), (1, 77), (30, 64)), ((1, 120), (90, 100))):
            assert torch.equal(logits(lengths), whole), lengths


def before(batch: PagedBatch) -> AttentionMetadata:
    """The step that computed all tokens before the batch's own."""
    metadata = batch.metadata
    starts = metadata.query_start_loc
    lengths = metadata.seq_lens - (starts[1:] - starts[:-1])
    positions = [torch.arange(int(length)) for length in lengths]
    slots = [
        table[position // 16].long() * 16 + position % 16
        for table, position in zip(metadata.block_tables, positions, strict=True)
    ]
    return AttentionMetadata(
        query_start_loc=torch.tensor([0, *lengths.tolist()]).cumsum(0).int(),
        seq_lens=lengths.int(),
        block_tables=metadata.block_tables,
        slot_mapping=torch.cat(slots),
        positions=torch.cat(positions),
        max_query_len=int(lengths.max()),
        max_seq_len=int(lengths.max()),
    )
