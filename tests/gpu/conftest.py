"""The CUDA kernels under test: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from engine.kernels import abi
from engine.kernels.backend import AttentionMetadata, KernelBackend
from engine.kernels.cuda import CudaBackend
from engine.kernels.library import KernelLibrary
from engine.kernels.native import NativeBackend
from tests.engine.kernels.cases import PagedBatch
from tests.gpu.emulation.build import build_library

SPLIT_TOKENS = 128  # of the emulation with fixed splits, so that short sequences have several


class EmulatedBackend(NativeBackend):
    """The CUDA library compiled for the CPU, over tensors in host memory. The workspace comes as NaN."""

    name = "emulated cuda"

    def __init__(self, path: Path, split_tokens: int = 0) -> None:
        super().__init__(KernelLibrary(path, ctypes.CDLL(str(path))), "cpu", 0, split_tokens)

    def _attach_workspace(self, params: abi.PagedAttentionParams, query: torch.Tensor) -> None:
        needed = self.library.attention_workspace(params)
        self._workspace = torch.full((needed // 4,), float("nan"), device=query.device)
        params.workspace, params.workspace_bytes = self._workspace.data_ptr() if needed else None, needed


class Kernels(NamedTuple):
    """A backend and the device that its tensors live on. Inputs are made on the CPU; results come back to it."""

    backend: KernelBackend
    device: str

    @property
    def native(self) -> NativeBackend:
        """The backend, of which the test wants the library."""
        assert isinstance(self.backend, NativeBackend)
        return self.backend

    def metadata(self, metadata: AttentionMetadata) -> AttentionMetadata:
        return metadata._replace(
            query_start_loc=metadata.query_start_loc.to(self.device),
            seq_lens=metadata.seq_lens.to(self.device),
            block_tables=metadata.block_tables.to(self.device),
            slot_mapping=metadata.slot_mapping.to(self.device),
            positions=metadata.positions.to(self.device),
        )

    def attend(self, batch: PagedBatch, sliding_window: int | None = None) -> torch.Tensor:
        out = self.backend.paged_attention(
            _moved(batch.query, self.device),
            _moved(batch.key_cache, self.device),
            _moved(batch.value_cache, self.device),
            self.metadata(batch.metadata),
            batch.scale,
            sliding_window,
        )
        return out.cpu()


def _moved(view: torch.Tensor, device: str) -> torch.Tensor:
    """The view on another device with its strides, which `.to()` would make contiguous."""
    if view.device.type == device:
        return view
    base = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).to(device)
    return base.as_strided(view.shape, view.stride(), view.storage_offset())


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("the emulation of the CUDA kernels needs g++")
    return build_library()


@pytest.fixture
def emulated(emulated_library: Path) -> Kernels:
    return Kernels(EmulatedBackend(emulated_library), "cpu")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each way to run the CUDA kernels."""
    if request.param == "cuda":
        return Kernels(CudaBackend(), "cuda")
    emulated: Kernels = request.getfixturevalue("emulated")
    return emulated


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def invariant_kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each way to run the CUDA kernels so that no row depends on its batch."""
    if request.param == "cuda":
        return Kernels(CudaBackend(batch_invariant=True), "cuda")
    return Kernels(EmulatedBackend(request.getfixturevalue("emulated_library"), SPLIT_TOKENS), "cpu")
