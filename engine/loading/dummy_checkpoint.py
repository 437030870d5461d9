"""Random weights in the shape of a published model, or of any config.json: for tests and speed measurements."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ModelLoadError
from engine.loading.checkpoint import Checkpoint
from engine.loading.dummy_shapes import SHAPES
from engine.loading.hf_config import read_hf_config
from engine.loading.tensor_part import CheckpointTensor, TensorPart, cut
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.tokenization import Tokenizer

_SEED = 0
_POOL_SIZE = 1_000_003  # prime, so that no row length divides it and rows differ


class DummyCheckpoint(Checkpoint):
    """Weights drawn from a fixed seed: the same in every process.

    Each tensor is a stretch of one pool of normal numbers, repeated, scaled to keep activations near 1: drawing
    billions of numbers would take minutes, and speed does not depend on their values. The pool lies where the weights
    are wanted, and so is all that is made of it.
    """

    def __init__(self, source: str, shape: str) -> None:
        super().__init__(source, name=f"dummy-{Path(shape).stem if shape not in SHAPES else shape}")
        self._path = None if shape in SHAPES else Path(shape).expanduser()
        if self._path is not None and self._path.is_dir():
            self._path /= "config.json"
        if self._path is None:
            config = SHAPES[shape]
        elif self._path.is_file():
            config = read_hf_config(self._path, fingerprint="")
        else:
            raise ModelLoadError(f"{source}: {shape} is neither a file nor one of {', '.join(sorted(SHAPES))}")
        digest = hashlib.sha256(f"dummy {_SEED} {config!r}".encode()).hexdigest()[:32]
        self._config = dataclasses.replace(config, fingerprint=digest)

    def model_config(self) -> ModelConfig:
        return self._config

    def tokenizer(self) -> Tokenizer | None:
        from engine.tokenization import tokenizer_from_hf_folder

        return None if self._path is None else tokenizer_from_hf_folder(self._path.parent)

    def tensors(self) -> Iterator[tuple[str, CheckpointTensor]]:
        import torch

        dtype = getattr(torch, self._config.dtype)
        pool = torch.randn(_POOL_SIZE, generator=torch.Generator().manual_seed(_SEED)).to(self.device, dtype)
        for name, shape in self._weight_shapes.items():
            yield name, CheckpointTensor(shape, partial(self._read, pool, name, shape))

    def _read(self, pool: torch.Tensor, name: str, shape: tuple[int, ...], part: TensorPart | None) -> torch.Tensor:
        import torch

        if part is not None and part.dim:
            # A column at a time of whole rows would be slow; a few megabytes of them are not much.
            rows_at_once = max(1, _POOL_SIZE // shape[1])
            starts = range(0, shape[0], rows_at_once)
            chunks = [TensorPart(0, (range(start, min(start + rows_at_once, shape[0])),)) for start in starts]
            return torch.cat([cut(self._read(pool, name, shape, rows), part).clone() for rows in chunks])
        if len(shape) == 1 and name.endswith(".weight"):  # a norm's
            return torch.full(shape, 1.0 - self._config.norm_weight_offset, dtype=pool.dtype, device=pool.device)
        stretches = (range(shape[0]),) if part is None else part.stretches
        width = math.prod(shape[1:])
        first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        scale = 0.02 if len(shape) == 1 else shape[-1] ** -0.5
        values = [_stretch(pool, first + rows.start * width, len(rows) * width).mul_(scale) for rows in stretches]
        return torch.cat(values).view(-1, *shape[1:]) if len(values) > 1 else values[0].view(-1, *shape[1:])

    @property
    def num_weight_bytes(self) -> int:
        element = 4 if self._config.dtype == "float32" else 2
        return element * sum(map(math.prod, self._weight_shapes.values()))

    @property
    def fingerprint(self) -> str:
        return self._config.fingerprint

    @cached_property
    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the model itself says it wants, asked of one without memory."""
        import torch

        from engine.kernels.reference import ReferenceBackend
        from engine.models import build_model

        model = build_model(self._config, ReferenceBackend(), torch.float32, torch.device("meta"))
        return {name: target.shape for name, target in model.weight_targets().items()}


def _stretch(pool: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """A new tensor: the pool from `start` on, over and over."""
    start %= len(pool)
    return pool.repeat(-(-(start + count) // len(pool)))[start : start + count].clone()
