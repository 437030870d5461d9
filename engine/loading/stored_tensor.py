"""A checkpoint's tensor as its file holds it: bytes and a type, no torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError
from engine.int32_buffer import Int32Array

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


class StoredTensor(NamedTuple):
    """One tensor.

    Attributes:
        name: by Hugging Face's convention ("model.layers.0.self_attn.q_proj.weight").
        shape: outermost first; rows of quantised types are whole blocks.
        type: "F32", "F16", "BF16" or a GGUF block type.
        data: its bytes, perhaps a view of a mapped file.
        row_order: source row of each row that the model wants, or None if they are in order.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: ByteArray
    row_order: Int32Array | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def floats(self) -> FloatArray:
        """The values of a tensor of plain floats (norms, biases, tables of positions)."""
        if self.type == "F32":
            values = self.data.view(np.float32)
        elif self.type == "F16":
            values = self.data.view(np.float16).astype(np.float32)
        elif self.type == "BF16":
            values = (self.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            raise ModelLoadError(f"tensor {self.name} is {self.type}, expected plain floats")
        values = values.reshape(self.shape)
        return values if self.row_order is None else values[self.row_order]
