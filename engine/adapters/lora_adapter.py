"""One LoRA adapter (arXiv 2106.09685) in a PEFT folder: its A and B by the engine's names of the matrices they add to.

`W x` becomes `W x + scale * B (A x)`, A `[rank, in]`, B `[out, rank]`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.adapters.adapter_source import CONFIG, WEIGHTS, open_adapter
from engine.adapters.peft_config import PeftConfig, read_peft_config
from engine.errors import ModelLoadError
from engine.loading.decoder_weights import Linear, decoder_linears
from engine.loading.file_supply import LOCAL, FileSupply
from engine.loading.fingerprint import Span
from engine.loading.safetensors_checkpoint import read_header
from engine.loading.stored_tensor import ByteArray, FloatArray, StoredTensor
from engine.loading.weight_names import WEIGHT_NAMES
from engine.model_config import ModelConfig
from engine.parallel import DecoderShard

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class LoraFactors(NamedTuple):
    """What is added to one matrix `[n, k]`: a `[rank, k]`, b `[n, rank]` with the scale in it."""

    a: FloatArray
    b: FloatArray


class _WeightsFile:
    """An adapter's file, held open, so that its folder may be deleted once it is known.

    It is read, not mapped: a mapped file that is cut or whose disk fails ends the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._version = self._stat()

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, span: Span) -> ByteArray:
        """A tensor's bytes. Raises ModelLoadError: it has been written to since; OSError: it cannot be read."""
        parts, position, end = [], span.start, span.start + span.num_bytes
        while position < end and (part := os.pread(self._fd, end - position, position)):
            parts.append(part)
            position += len(part)
        # Afterwards, so that what was read is of the version that was checked.
        if position < end or self._stat() != self._version:
            raise ModelLoadError(f"{self._path} has changed since it was checked; give a new version another name")
        return np.frombuffer(b"".join(parts), dtype=np.uint8)

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns


class _Tensor(NamedTuple):
    """A tensor of an adapter's file, read when it is asked for."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: _WeightsFile
    span: Span

    def floats(self) -> FloatArray:
        return StoredTensor(self.name, self.shape, self.type, self.file.read(self.span)).floats()


class _Stored(NamedTuple):
    """A's and B's tensors of one module."""

    a: _Tensor
    b: _Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoraAdapter:
    """A checked adapter. Its file stays open, so that a folder may be deleted once it is known.

    Attributes:
        name: by which requests ask for it.
        source: what its folder was named by.
        ranks: of each matrix that it adds to, by the keys of `decoder_weights` ("layers.3.query").
    """

    def __init__(
        self,
        name: str,
        source: str,
        linears: Mapping[str, Linear],
        modules: Mapping[str, _Stored],
        supply: FileSupply = LOCAL,
    ) -> None:
        self.name = name
        self.source = source
        self._supply = supply  # what it has fetched stays on the node as long as this lives
        self._linears = {key: linear for key, linear in linears.items() if linear.tensor in modules}
        self._modules = modules
        self.ranks = {key: modules[linear.tensor].rank for key, linear in self._linears.items()}

    def factors(self, key: str) -> LoraFactors | None:
        """float32 A and B of one matrix, None if nothing is added to it.

        Raises:
            ModelLoadError: the file has been written to since it was checked.
            OSError: it cannot be read.
        """
        linear = self._linears.get(key)
        if linear is None:
            return None
        stored = self._modules[linear.tensor]
        rows, columns = linear.rows, linear.columns
        a = stored.a.floats()[:, columns.start : columns.stop]
        b = stored.b.floats()[rows.start : rows.stop] * np.float32(stored.scale)
        return LoraFactors(np.ascontiguousarray(a), np.ascontiguousarray(b))

    def shape(self, key: str) -> tuple[int, int]:
        """`[n, k]` of a matrix that it adds to."""
        linear = self._linears[key]
        return len(linear.rows), len(linear.columns)

    @property
    def num_elements(self) -> int:
        """Numbers in all A and B."""
        return sum(rank * sum(self.shape(key)) for key, rank in self.ranks.items())


def read_adapter(
    name: str, source: str, model: ModelConfig, max_rank: int, shard: DecoderShard | None = None
) -> LoraAdapter:
    """Read and check an adapter for a base.

    Args:
        source: its folder, as open_adapter takes it.
        max_rank: the largest rank that is taken.
        shard: one rank's part of the base, for its part of the adapter; None is all.

    Raises:
        ModelLoadError: no PEFT folder, not LoRA of linear layers, or not of this base. The message names file, tensor
            and what was expected.
    """
    linears = {linear.key: linear for linear in decoder_linears(model, shard)}
    try:
        path, supply = open_adapter(source)
        config = read_peft_config(path / CONFIG)
        checker = _Checker(config, model, {linear.tensor: linear for linear in linears.values()}, max_rank)
        checker.check_targets()
        modules = checker.match(_tensors(path / WEIGHTS), path / WEIGHTS)
    except ModelLoadError as error:
        raise ModelLoadError(f"adapter {name}: {error}") from error
    return LoraAdapter(name, source, linears, modules, supply)


def _tensors(path: Path) -> list[_Tensor]:
    if not path.is_file() and path.with_suffix(".bin").is_file():
        raise ModelLoadError(f"{path.with_suffix('.bin')}: pickled weights are never read; convert them to safetensors")
    file = read_header(path)
    weights, entries = _WeightsFile(path), json.loads(file.header)
    return [
        _Tensor(span.name, tuple(entries[span.name]["shape"]), entries[span.name]["dtype"], weights, span)
        for span in file.spans
    ]


class _Checker:
    """Holds an adapter against its base.

    Args:
        modules: the base's linear layers by their names in a checkpoint.
    """

    def __init__(self, config: PeftConfig, model: ModelConfig, modules: dict[str, Linear], max_rank: int) -> None:
        self._config = config
        self._model = model
        self._modules = modules
        self._max_rank = max_rank
        self._prefix = WEIGHT_NAMES[model.architecture].base_model_prefix

    def check_targets(self) -> None:
        """Every target names a linear layer of the base, and no rank is above the bound."""
        config = self._config
        targets = config.targets if isinstance(config.targets, tuple) else (config.targets,)
        for target in targets:
            single = (target,) if isinstance(config.targets, tuple) else target
            alone = dataclasses.replace(config, targets=single)
            if not any(alone.adapts(module, self._layer(module)) for module in self._modules):
                known = sorted({module.rpartition(".")[2] for module in self._modules})
                raise ModelLoadError(
                    f"{config.path}: target_modules: {target!r} is no linear layer of {self._model.architecture}'s "
                    f"decoder layers in question; those have {', '.join(known)}"
                )
        for module in self._modules:
            rank = config.rank_of(module)
            if config.adapts(module, self._layer(module)) and rank > self._max_rank:
                raise ModelLoadError(f"{config.path}: rank {rank} of {module} is above max_lora_rank={self._max_rank}")

    def match(self, tensors: Iterable[_Tensor], path: Path) -> dict[str, _Stored]:
        """A and B of each adapted module: all of them, each in its shape, and no other tensor."""
        found: dict[tuple[str, str], _Tensor] = {}
        for tensor in tensors:
            match = _TENSOR.fullmatch(tensor.name)
            module = self._module(match["module"]) if match else None
            if match is None or module is None or not self._config.adapts(module, self._layer(module)):
                raise ModelLoadError(
                    f"{path}: tensor {tensor.name} has no place: expected "
                    f"base_model.model.MODULE.lora_A.weight and lora_B.weight of {self._model.architecture}'s modules "
                    f"in target_modules (the adapter is for {self._config.base})"
                )
            if (module, match["factor"]) in found:
                raise ModelLoadError(f"{path}: tensor {tensor.name} occurs twice")
            found[module, match["factor"]] = tensor
        modules = {}
        for module, linear in self._modules.items():
            if not self._config.adapts(module, self._layer(module)):
                continue
            rank = self._config.rank_of(module)
            a = self._checked(found, path, module, "A", (rank, linear.source_columns))
            b = self._checked(found, path, module, "B", (linear.source_rows, rank))
            modules[module] = _Stored(a, b, self._config.scale_of(module))
        return modules

    def _checked(
        self,
        found: dict[tuple[str, str], _Tensor],
        path: Path,
        module: str,
        factor: str,
        shape: tuple[int, int],
    ) -> _Tensor:
        tensor = found.get((module, factor))
        if tensor is None:
            raise ModelLoadError(f"{path}: tensor base_model.model.{module}.lora_{factor}.weight is missing")
        if tensor.shape != shape:
            raise ModelLoadError(
                f"{path}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: the adapter, "
                f"made for {self._config.base}, does not fit this base"
            )
        return tensor

    def _module(self, stored: str) -> str | None:
        """The base's name of a module; adapters of the bare decoder leave out the module that holds it."""
        return next((name for name in (stored, f"{self._prefix}.{stored}") if name in self._modules), None)

    def _layer(self, module: str) -> int:
        return int(self._modules[module].key.split(".")[1])
