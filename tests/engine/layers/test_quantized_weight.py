"""Matrices quantised as they are loaded: in parts, transposed and split over ranks, each row with its own scale."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.adapter_products import AdapterRun, Factors, PlainAdapterProducts, cut_tiles
from engine.kernels.quantized_products import TorchRowKernels
from engine.kernels.reference import ReferenceBackend
from engine.layers import Linear, WeightFormat, quantized_weight
from engine.layers.lora import AdapterRows, LinearAdapters
from engine.layers.quantized_weight import QuantizedWeight
from engine.loading.tensor_part import cut
from engine.parallel.linear import ColumnParallelLinear, Projection, RowParallelLinear

CPU = torch.device("cpu")
REFERENCE = ReferenceBackend()
KERNELS = TorchRowKernels()
INT8 = WeightFormat(torch.int8, KERNELS)
FP8 = WeightFormat(torch.float8_e4m3fn, KERNELS)


def values_of(layer: Linear) -> torch.Tensor:
    assert isinstance(layer.weight, QuantizedWeight)
    return layer.weight.codes.float() * layer.weight.scales.unsqueeze(-1)


def rounded(weight: torch.Tensor, code_type: torch.dtype) -> torch.Tensor:
    codes, scales = KERNELS.quantize_rows(weight, code_type, 0)
    return codes.float() * scales.unsqueeze(-1)


@pytest.mark.parametrize("weight_format", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_projection_is_quantised_row_by_row(
    transposed: bool, weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weight, "_LOADED_VALUES", 100)  # several stretches a tensor
    layer = Linear(32, [32, 16], True, REFERENCE, torch.float32, CPU, weight_format)
    first, second = torch.randn(32, 32) * torch.logspace(-3, 3, 32).unsqueeze(-1), torch.randn(16, 32).bfloat16()
    targets = layer.weight_targets("a", "b", transposed=transposed)
    for name, weight in (("a", first), ("b", second)):
        assert targets[f"{name}.weight"].shape == (weight.t().shape if transposed else weight.shape)
        targets[f"{name}.weight"].load(weight.t() if transposed else weight)
        targets[f"{name}.bias"].load(torch.ones(len(weight)))
    expected = rounded(torch.cat((first, second.float())), weight_format.code_type)
    assert torch.equal(values_of(layer), expected)
    x = torch.randn(3, 32)
    product = rounded(x, weight_format.code_type) @ expected.T + 1.0
    torch.testing.assert_close(layer(x), product, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_ranks_hold_their_rows_or_their_columns(transposed: bool) -> None:
    weight = torch.randn(48, 64)
    stored = weight.t() if transposed else weight
    own = [range(16, 32), range(32, 48)]
    projections = [Projection(24, range(8, 16)), Projection(24, range(16, 24))]
    column = ColumnParallelLinear(64, projections, False, REFERENCE, torch.float32, CPU, INT8)
    (target,) = column.weight_targets("fused", transposed=transposed).values()
    target.load(cut(stored, target.part))
    rows = torch.cat((weight[8:16], weight[40:48]))
    assert torch.equal(values_of(column), rounded(rows, torch.int8))
    for columns in own:
        row = RowParallelLinear(64, columns, 48, False, REFERENCE, torch.float32, CPU, None, INT8)
        (target,) = row.weight_targets("out", transposed=transposed).values()
        target.load(cut(stored, target.part))
        assert torch.equal(values_of(row), rounded(weight[:, columns.start : columns.stop], torch.int8))


def test_a_matrix_that_torch_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"int8 needs matrices whose sides are multiples of 8; .* one of 12 x 16"):
        Linear(16, [12], False, REFERENCE, torch.float32, CPU, INT8)
    with pytest.raises(ConfigError, match=r"float8_e4m3fn needs matrices .* multiples of 16; .* one of 16 x 24"):
        Linear(24, [16], False, REFERENCE, torch.float32, CPU, FP8)


def test_adapters_are_added_in_full_precision() -> None:
    layer = Linear(32, [16, 16], False, REFERENCE, torch.float32, CPU, INT8)
    for target in layer.weight_targets("a", "b").values():
        target.load(torch.randn(16, 32))
    x, rows = torch.randn(3, 32), AdapterRows()
    plain = layer(x)
    layer.adapters = LinearAdapters(rows, PlainAdapterProducts(layer.parts, REFERENCE))
    factors = Factors(torch.randn(4, 32), torch.randn(16, 4))
    layer.adapters.load(0, [None, factors])
    rows.tiles = cut_tiles([AdapterRun(0, 1, 3)], 16, CPU)
    expected = plain.clone()
    expected[1:, 16:] += x[1:] @ factors.a.T @ factors.b.T
    torch.testing.assert_close(layer(x), expected)
