"""What the ranks hold together is the layer, and the sum or the row of their products is its product."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.reference import ReferenceBackend
from engine.layers import Linear, WeightTarget
from engine.loading.tensor_part import cut
from engine.parallel.linear import ColumnParallelLinear, Projection, RowParallelLinear

CPU = torch.device("cpu")
REFERENCE = ReferenceBackend()
NAMES = {"apart": ("q", "k", "v"), "fused": ("qkv",)}
SPLITS = [[range(6), range(2), range(2)], [range(6, 9), range(2, 3), range(2, 3)]]
SIZES = [9, 3, 3]


def fill(targets: dict[str, WeightTarget]) -> None:
    """As a checkpoint of random tensors does: each target loads its part."""
    for name, target in targets.items():
        seed = sum(name.encode())
        whole = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed))
        target.load(cut(whole, target.part))


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_column_parallel_ranks_compute_their_rows_of_each_projection(names: str, transposed: bool) -> None:
    whole = Linear(5, SIZES, True, REFERENCE, torch.float32, CPU)
    fill(whole.weight_targets(*NAMES[names], transposed=transposed))
    x = torch.randn(4, 5)
    query, key, value = torch.split(whole(x), SIZES, dim=1)
    for own in SPLITS:
        projections = [Projection(size, rows) for size, rows in zip(SIZES, own, strict=True)]
        layer = ColumnParallelLinear(5, projections, True, REFERENCE, torch.float32, CPU)
        targets = layer.weight_targets(*NAMES[names], transposed=transposed)
        assert {name: target.shape for name, target in targets.items()} == {
            name: target.shape for name, target in whole.weight_targets(*NAMES[names], transposed=transposed).items()
        }
        fill(targets)
        expected = [part[:, rows.start : rows.stop] for part, rows in zip((query, key, value), own, strict=True)]
        torch.testing.assert_close(layer(x), torch.cat(expected, dim=1))


class _Sum:
    """Ranks that come one after another: the last one's sum is that of all."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.total = tensor.clone() if self.total is None else self.total + tensor
        tensor.copy_(self.total)


@pytest.mark.parametrize("transposed", [False, True])
def test_row_parallel_ranks_sum_to_the_product_with_its_bias_once(transposed: bool) -> None:
    whole = Linear(9, [4], True, REFERENCE, torch.float32, CPU)
    fill(whole.weight_targets("out", transposed=transposed))
    x, communicator = torch.randn(3, 9), _Sum()
    for own in (range(6), range(6, 9)):
        layer = RowParallelLinear(9, own, 4, True, REFERENCE, torch.float32, CPU, communicator)  # type: ignore[arg-type]
        targets = layer.weight_targets("out", transposed=transposed)
        assert targets["out.weight"].shape == ((9, 4) if transposed else (4, 9))
        fill(targets)
        y = layer(x[:, own.start : own.stop].contiguous())
    torch.testing.assert_close(y, whole(x))


def test_a_rank_alone_reads_whole_tensors() -> None:
    column = ColumnParallelLinear(5, [Projection(9, range(9))] * 2, True, REFERENCE, torch.float32, CPU)
    row = RowParallelLinear(9, range(9), 4, True, REFERENCE, torch.float32, CPU, None)
    targets = {**column.weight_targets("a", "b"), **column.weight_targets("ab"), **row.weight_targets("c")}
    assert all(target.part is None for target in targets.values())
