"""A Hugging Face folder: config.json, safetensors (sharded or not) and tokenizer files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.checkpoint import Checkpoint
from engine.loading.config_reader import read_json
from engine.loading.file_supply import LOCAL, FileSupply
from engine.loading.fingerprint import Span, content_fingerprint, sampled_ranges
from engine.loading.hf_config import read_hf_config
from engine.loading.stored_tensor import StoredTensor
from engine.loading.tensor_part import CheckpointTensor, TensorPart
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.tokenization import Tokenizer

_BYTES_PER_ELEMENT = {"F32": 4, "BF16": 2, "F16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_FIRST_BYTES = 1 << 16  # many a header, or at least its length


class SafetensorsCheckpoint(Checkpoint):
    """A folder as `save_pretrained` writes it. Pickled weights are never read."""

    def __init__(self, source: str, folder: Path, supply: FileSupply = LOCAL) -> None:
        super().__init__(source, name=folder.resolve().name)
        self.folder = folder
        self._supply = supply

    def model_config(self) -> ModelConfig:
        return read_hf_config(self.folder / "config.json", self.fingerprint)

    def tokenizer(self) -> Tokenizer | None:
        from engine.tokenization import tokenizer_from_hf_folder

        return tokenizer_from_hf_folder(self.folder)

    def tensors(self) -> Iterator[tuple[str, CheckpointTensor]]:
        from safetensors import SafetensorError, safe_open

        for file in self._files:
            entries = json.loads(file.header)
            try:
                with safe_open(file.path, framework="pt", device=self.device) as tensors:
                    for span in file.spans:
                        shape = tuple(entries[span.name]["shape"])
                        yield span.name, CheckpointTensor(shape, partial(self._read, file.path, tensors, span, shape))
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{self._supply.name_of(file.path)}: {error}") from error

    def prefetch(self, part_of: Callable[[str], TensorPart | None]) -> None:
        wanted = {}
        for file in self._files:
            entries = json.loads(file.header)
            ranges = [_byte_ranges(span, entries[span.name]["shape"], part_of(span.name)) for span in file.spans]
            wanted[file.path] = [each for of_tensor in ranges for each in of_tensor]
        self._supply.fetch(wanted)

    def _read(
        self, path: Path, tensors: Any, span: Span, shape: tuple[int, ...], part: TensorPart | None
    ) -> torch.Tensor:
        self._supply.fetch({path: _byte_ranges(span, shape, part)})
        return _read_part(tensors, span.name, part)

    def weight_types(self) -> set[str]:
        return {json.loads(file.header)[span.name]["dtype"] for file in self._files for span in file.spans}

    def stored_tensors(self) -> Iterator[StoredTensor]:
        self._supply.fetch({file.path: None for file in self._files})
        for file in self._files:
            data = np.memmap(file.path, dtype=np.uint8, mode="r")
            entries = json.loads(file.header)
            for span in file.spans:
                entry = entries[span.name]
                stored = data[span.start : span.start + span.num_bytes]
                yield StoredTensor(span.name, tuple(entry["shape"]), entry["dtype"], stored)

    @property
    def num_weight_bytes(self) -> int:
        return sum(span.num_bytes for file in self._files for span in file.spans)

    @cached_property
    def fingerprint(self) -> str:
        headers = [json.dumps(read_json(self.folder / "config.json"), sort_keys=True).encode()]
        headers += [file.header for file in self._files]
        self._supply.fetch({file.path: sampled_ranges(file.spans) for file in self._files})
        return content_fingerprint(headers, [(file.path, file.spans) for file in self._files])

    @cached_property
    def _files(self) -> list[SafetensorsFile]:
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            return self._read_headers([self._single_file()])
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index}: weight_map is missing or empty")
        paths = []
        for name in sorted(set(weight_map.values())):
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelLoadError(f"{index}: {name!r} is not a file name")
            paths.append(self.folder / name)
        files = self._read_headers(paths)
        found = {span.name: file.path.name for file in files for span in file.spans}
        for tensor, name in weight_map.items():
            if found.get(tensor) != name:
                raise ModelLoadError(f"{self.folder / name}: tensor {tensor} is missing, {index.name} expects it here")
        return files

    def _read_headers(self, paths: list[Path]) -> list[SafetensorsFile]:
        """All at once, in two turns: how long each is, and then the rest."""
        self._supply.fetch({path: [range(min(_FIRST_BYTES, _size(path)))] for path in paths})
        self._supply.fetch({path: [range(min(_header_end(path), _size(path)))] for path in paths})
        return [read_header(path, self._supply.name_of(path)) for path in paths]

    def _single_file(self) -> Path:
        path = self.folder / "model.safetensors"
        if path.is_file():
            return path
        others = sorted(self.folder.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        if others:
            raise ModelLoadError(
                f"{self.folder}: {len(others)} .safetensors files without model.safetensors.index.json to order them"
            )
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickled:
            raise ModelLoadError(
                f"{self.folder}: only pickled weights ({', '.join(pickled[:3])}), which can run code when they are "
                f"loaded; convert them to safetensors"
            )
        raise ModelLoadError(f"{self.folder}: no .safetensors file")


def _byte_ranges(span: Span, shape: Sequence[int], part: TensorPart | None) -> list[range]:
    """The bytes of a file that hold a part of a tensor: of rows, theirs; of columns, all, as each row has some."""
    if part is None or part.dim or not shape or not shape[0]:
        return [range(span.start, span.start + span.num_bytes)]
    row = span.num_bytes // shape[0]
    return [range(span.start + each.start * row, span.start + each.stop * row) for each in part.stretches]


def _size(path: Path) -> int:
    """0 for a file that is not there, which `read_header` says."""
    return path.stat().st_size if path.is_file() else 0


def _header_end(path: Path) -> int:
    if _size(path) < 8:
        return 0
    with path.open("rb") as file:
        return 8 + min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES)


def _read_part(tensors: Any, name: str, part: TensorPart | None) -> torch.Tensor:
    """What is not asked for is not read."""
    import torch

    if part is None:
        whole: torch.Tensor = tensors.get_tensor(name)
        return whole
    stored, before = tensors.get_slice(name), (slice(None),) * part.dim
    return torch.cat([stored[(*before, slice(each.start, each.stop))] for each in part.stretches], part.dim)


class SafetensorsFile(NamedTuple):
    """One file's layout: its raw JSON header and where each tensor's bytes lie."""

    path: Path
    header: bytes
    spans: list[Span]


def read_header(path: Path, name: str | None = None) -> SafetensorsFile:
    """Read and check the header of one safetensors file. Raises ModelLoadError or UnsupportedModelError.

    Args:
        name: what errors call it.
    """
    name = name or str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            num_header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if num_header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelLoadError(f"{name}: truncated or not a safetensors file ({size} bytes)")
            header = file.read(num_header_bytes)
    except FileNotFoundError:
        raise ModelLoadError(f"{name}: no such file") from None
    except OSError as error:
        raise ModelLoadError(f"{name}: {error}") from error
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        spans = [_span(name, tensor, entry, 8 + num_header_bytes) for tensor, entry in entries.items()]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{name}: malformed safetensors header: {error}") from error
    end = max((span.start + span.num_bytes for span in spans), default=0)
    if end > size:
        raise ModelLoadError(f"{name}: truncated: its tensors end at byte {end}, the file at {size}")
    return SafetensorsFile(path, header, spans)


def _span(where: str, name: str, entry: dict[str, Any], data_start: int) -> Span:
    if entry["dtype"] not in _BYTES_PER_ELEMENT:
        raise UnsupportedModelError(f"{where}: type {entry['dtype']} of tensor {name}", _BYTES_PER_ELEMENT)
    start, end = entry["data_offsets"]
    num_elements = 1
    for extent in entry["shape"]:
        num_elements *= extent
    if end - start != num_elements * _BYTES_PER_ELEMENT[entry["dtype"]]:
        raise ModelLoadError(f"{where}: tensor {name} of shape {entry['shape']} cannot fill {end - start} bytes")
    return Span(name, data_start + start, end - start)
