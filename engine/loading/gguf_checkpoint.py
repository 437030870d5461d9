"""One GGUF file: metadata, tokenizer and (quantised) weights together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import ModelLoadError
from engine.int32_buffer import Int32Array
from engine.loading.checkpoint import Checkpoint
from engine.loading.file_supply import LOCAL, FileSupply
from engine.loading.fingerprint import content_fingerprint
from engine.loading.gguf_config import ROPE_FACTORS, hf_weight_name, read_gguf_config
from engine.loading.gguf_reader import GGUFFile, GGUFTensor
from engine.loading.stored_tensor import StoredTensor
from engine.loading.tensor_part import CheckpointTensor, TensorPart
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.tokenization import Tokenizer

_STORED_BYTES = {"F16": 2, "BF16": 2}  # per element as yielded; everything else comes as float32


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of the Llama family or of Gemma 3. Quantised weights are dequantised to float32."""

    def __init__(self, source: str, path: Path, supply: FileSupply = LOCAL) -> None:
        super().__init__(source, name=path.stem)
        self.path = path
        self._supply = supply

    def model_config(self) -> ModelConfig:
        return read_gguf_config(self._file, self.fingerprint)

    def tokenizer(self) -> Tokenizer | None:
        from engine.tokenization import tokenizer_from_gguf

        if "tokenizer.ggml.model" not in self._file.metadata:
            return None
        return tokenizer_from_gguf(self._file.metadata, str(self.path))

    def tensors(self) -> Iterator[tuple[str, CheckpointTensor]]:
        for tensor, name, row_order in self._named_tensors():
            yield name, CheckpointTensor(tensor.shape, partial(self._read, tensor, row_order))

    def _read(self, tensor: GGUFTensor, row_order: Int32Array | None, part: TensorPart | None) -> torch.Tensor:
        """Only the blocks that hold the part are decoded."""
        import torch

        from engine.loading.gguf_dequantize import dequantize

        if part is None:
            part = TensorPart(0, (range(tensor.shape[0]),))
        parts = []
        for stretch in part.stretches:
            if part.dim:
                whole = dequantize(self._file.data, tensor, columns=stretch)
                parts.append(whole if row_order is None else whole[row_order])
            elif row_order is None:
                parts.append(dequantize(self._file.data, tensor, rows=stretch))
            else:  # heads, each of which holds its rows in another order
                order = row_order[stretch.start : stretch.stop]
                first = int(order.min())
                rows = range(first, int(order.max()) + 1)
                parts.append(dequantize(self._file.data, tensor, rows=rows)[order - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts, part.dim)

    def stored_tensors(self) -> Iterator[StoredTensor]:
        data = np.frombuffer(self._file.data, dtype=np.uint8)
        for tensor, name, row_order in self._named_tensors():
            stored = data[tensor.start : tensor.start + tensor.num_bytes]
            yield StoredTensor(name, tensor.shape, tensor.type.name, stored, row_order)

    def _named_tensors(self) -> Iterator[tuple[GGUFTensor, str, Int32Array | None]]:
        """Each weight, its name, and the order that its rows should have."""
        config = self.model_config()
        permuted = {
            "self_attn.q_proj": config.num_heads,
            "self_attn.k_proj": config.num_kv_heads,
        }
        if config.architecture != "LlamaForCausalLM":
            permuted = {}
        for tensor in self._file.tensors.values():
            if tensor.name == ROPE_FACTORS:
                continue
            name = hf_weight_name(self.path, config.architecture, tensor.name)
            num_heads = next((heads for part, heads in permuted.items() if part in name), None)
            if num_heads is not None and tensor.shape[0] != num_heads * config.head_dim:
                raise ModelLoadError(
                    f"{self.path}: tensor {tensor.name} has {tensor.shape[0]} rows, "
                    f"expected {num_heads} heads of {config.head_dim}"
                )
            yield tensor, name, None if num_heads is None else _half_split_order(num_heads, config.head_dim)

    @property
    def num_weight_bytes(self) -> int:
        total = 0
        for tensor in self._file.tensors.values():
            if tensor.name != ROPE_FACTORS:
                num_elements = tensor.num_bytes // tensor.type.block_bytes * tensor.type.block_size
                total += num_elements * _STORED_BYTES.get(tensor.type.name, 4)
        return total

    @cached_property
    def fingerprint(self) -> str:
        return content_fingerprint([self._file.header], [(self.path, self._file.spans())])

    @cached_property
    def _file(self) -> GGUFFile:
        # Whole: where a header ends shows only once it is read.
        self._supply.fetch({self.path: None})
        return GGUFFile(self.path, self._supply.name_of(self.path))


def _half_split_order(num_heads: int, head_dim: int) -> Int32Array:
    """Where each row of Q or K (or of its bias) lies in a GGUF file of Llama's.

    GGML rotates neighbouring pairs (2i, 2i+1), Hugging Face the halves (i, i + head_dim / 2); the conversion therefore
    interleaved the halves of each head: `[heads, 2, head_dim / 2]` became `[heads, head_dim / 2, 2]`.
    """
    rows = np.arange(num_heads * head_dim, dtype=np.int32)
    return rows.reshape(num_heads, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)
