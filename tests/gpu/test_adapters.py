"""The grouped kernels of adapters on a GPU: against plain products in float64, bitwise alone and in a batch, and in
the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import EngineConfig, LLMEngine
from engine.kernels.adapter_products import AdapterRun, Factors, PlainAdapterProducts, cut_tiles
from engine.kernels.reference import ReferenceBackend
from tests.engine.adapters.peft import SHAPES, write_adapter, write_base
from tests.engine.test_adapters import request, run

pytestmark = pytest.mark.gpu

PARTS = [slice(0, 4096), slice(4096, 5120), slice(5120, 6144)]
RUNS = [AdapterRun(2, 3, 4), AdapterRun(0, 4, 20), AdapterRun(7, 20, 21), AdapterRun(1, 21, 300)]
RANKS = {2: 16, 0: 64, 7: 3, 1: 8}


def make(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[int, list[Factors]]]:
    """Activations, the base's product, and adapters."""
    torch.manual_seed(0)
    x, y = torch.randn(310, 4096, device="cuda").to(dtype), torch.randn(310, 6144, device="cuda").to(dtype)
    slots = {
        slot: [
            Factors(
                (torch.randn(rank, 4096, device="cuda") / 64).to(dtype),
                (torch.randn(part.stop - part.start, rank, device="cuda") / rank**0.5).to(dtype),
            )
            for part in PARTS
        ]
        for slot, rank in RANKS.items()
    }
    return x, y, slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype: torch.dtype) -> None:
    adapters = pytest.importorskip("engine.kernels.triton.adapters", reason="Triton is not installed")
    device = torch.device("cuda", torch.cuda.current_device())
    x, y, slots = make(dtype)
    plain = PlainAdapterProducts(PARTS, ReferenceBackend())
    grouped = adapters.TritonAdapterProducts(PARTS, device)
    for slot, factors in slots.items():
        grouped.load(slot, factors)
        plain.load(slot, [Factors(item.a.double(), item.b.double()) for item in factors])
    expected, whole = y.double(), y.clone()
    plain.add_to(expected, x.double(), cut_tiles(RUNS, plain.tile_rows, device))
    grouped.add_to(whole, x, cut_tiles(RUNS, grouped.tile_rows, device))
    worst = (whole.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert worst.max() < (1e-5 if dtype == torch.float32 else 8e-3)
    for slot, row in ((2, 3), (0, 11), (1, 299)):
        alone = y[row : row + 1].clone()
        grouped.add_to(alone, x[row : row + 1], cut_tiles([AdapterRun(slot, 0, 1)], grouped.tile_rows, device))
        assert torch.equal(alone[0], whole[row])


def test_the_engine_gives_each_of_a_mixed_batch_what_a_cpu_gives_it_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path / "tiny")
    folders = {
        f"a{i}": write_adapter(tmp_path / f"a{i}", base, i, targets, rank, **config)
        for i, (targets, rank, config) in enumerate(SHAPES)
    }
    common = {"dtype": "float32", "kv_cache_dtype": "float32", "num_blocks": 128, "enable_lora": True}

    def engine(**options: object) -> LLMEngine:
        return LLMEngine.from_options(base, EngineConfig.from_dict({**common, "adapters": folders, **options}))

    names = ("", "a0", "a1", "a2", "a3")
    on_cpu = engine(device="cpu", kernels="reference")
    expected = [run(on_cpu, [request(name, seed)])[0] for seed, name in enumerate(names)]
    assert run(engine(device="cuda"), [request(name, seed) for seed, name in enumerate(names)]) == expected
    few = engine(device="cuda", max_loras=2)
    assert run(few, [request(name, seed) for seed, name in enumerate(names)]) == expected
    assert few.adapter_stats().num_evictions == 2
