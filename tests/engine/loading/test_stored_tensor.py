"""Plain floats of a tensor as a file holds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.errors import ModelLoadError
from engine.loading.stored_tensor import StoredTensor

VALUES = torch.tensor([[1.0, -2.5, 3e-5], [0.0, 65504.0, -1 / 3]])


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_are_the_stored_ones(name: str, dtype: torch.dtype) -> None:
    stored = VALUES.to(dtype)
    tensor = StoredTensor("x", (2, 3), name, stored.view(torch.uint8).numpy().reshape(-1))
    assert tensor.nbytes == 6 * stored.element_size()
    floats = tensor.floats()
    assert floats.dtype == np.float32
    assert np.array_equal(floats, stored.float().numpy())
    ordered = tensor._replace(row_order=np.array([1, 0], np.int32)).floats()
    assert np.array_equal(ordered, stored.float().numpy()[::-1])


def test_blocks_are_no_floats() -> None:
    tensor = StoredTensor("model.norm.weight", (32,), "Q8_0", np.zeros(34, np.uint8))
    with pytest.raises(ModelLoadError, match=r"tensor model\.norm\.weight is Q8_0, expected plain floats"):
        tensor.floats()
