"""Random weights in the shape of a published model, or of any config.json: for tests and speed measurements."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ModelLoadError
from engine.loading.checkpoint import Checkpoint
from engine.loading.dummy_shapes import SHAPES
from engine.loading.hf_config import read_hf_config
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.tokenization import Tokenizer

_SEED = 0
_POOL_SIZE = 1_000_003  # prime, so that no row length divides it and rows differ


class DummyCheckpoint(Checkpoint):
    """Weights drawn from a fixed seed: the same in every process.

    Each tensor is a stretch of one pool of normal numbers, repeated, scaled to keep activations near 1: drawing
    billions of numbers would take minutes, and speed does not depend on their values.
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

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        dtype = getattr(torch, self._config.dtype)
        pool = torch.randn(_POOL_SIZE, generator=torch.Generator().manual_seed(_SEED)).to(dtype)
        for name, shape in self._weight_shapes.items():
            if len(shape) == 1 and name.endswith(".weight"):  # a norm's
                yield name, torch.full(shape, 1.0 - self._config.norm_weight_offset, dtype=dtype)
                continue
            num_elements = math.prod(shape)
            digest = hashlib.sha256(name.encode()).digest()
            start = int.from_bytes(digest[:8], "little") % _POOL_SIZE
            repeats = -(-(start + num_elements) // _POOL_SIZE)
            values = pool.repeat(repeats)[start : start + num_elements].view(shape)
            yield name, values.mul_(0.02 if len(shape) == 1 else shape[-1] ** -0.5)

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
