"""The fixed-tile product in Triton's interpreter: against float64, and bitwise the same for a row in any batch."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.library import KernelError
from tests.engine.kernels.cases import assert_rounds_to
from tests.engine.kernels.triton.interpreter import InterpretedBackend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features", "bias"), [(1, 64, 64, False), (70, 130, 67, True), (3, 5, 1, True)]
)
def test_products(
    invariant: InterpretedBackend, num_rows: int, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(in_features)
    x = torch.randn(num_rows, in_features + 8).to(dtype)[:, :in_features]  # rows apart
    weight, offset = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    exact = x.double() @ weight.double().T + (offset.double() if bias else 0.0)
    assert_rounds_to(invariant.linear(x, weight, offset if bias else None), exact, slack=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_is_bitwise_the_same_alone_and_in_any_batch(invariant: InterpretedBackend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(70, 200).to(dtype), torch.randn(90, 200).to(dtype), torch.randn(90).to(dtype)
    whole = invariant.linear(x, weight, bias)
    for first, last in ((0, 1), (69, 70), (5, 40), (60, 70)):
        assert torch.equal(invariant.linear(x[first:last], weight, bias), whole[first:last]), (first, last)


def test_no_rows_and_what_does_not_fit(invariant: InterpretedBackend) -> None:
    weight = torch.ones(3, 8)
    assert invariant.linear(torch.ones(0, 8), weight, None).shape == (0, 3)
    with pytest.raises(KernelError, match=r"weight must be contiguous \[out_features, 7\], not \[3, 8\]"):
        invariant.linear(torch.ones(2, 7), weight, None)
    with pytest.raises(KernelError, match="bias has 2 elements, weight has 3 rows"):
        invariant.linear(torch.ones(2, 8), weight, torch.ones(2))
    with pytest.raises(KernelError, match=r"weight is torch\.float32, expected torch\.float16"):
        invariant.linear(torch.ones(2, 8).half(), weight, None)
