"""The CUDA library's attention with Triton's products and LayerNorm: logits bitwise the same in any batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.invariance import same_logits
from engine.kernels import select_backend
from engine.kernels.backend import KernelBackend
from engine.kernels.invariant import InvariantCudaBackend
from tests.engine.kernels.triton.conftest import interpreter, invariant
from tests.engine.kernels.triton.interpreter import InterpretedBackend
from tests.gpu.conftest import EmulatedBackend

__all__ = ["interpreter", "invariant"]  # fixtures

LENGTHS = (3, 1, 70)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 128, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "torch_dtype": "float16",
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "vocab_size": 48, "n_embd": 128, "n_layer": 1, "n_head": 2,
    "n_positions": 128, "torch_dtype": "float16",
}  # fmt: skip


class EmulatedInvariantBackend(InvariantCudaBackend, EmulatedBackend):
    """The library in the emulation, Triton in its interpreter."""

    def __init__(self, library: Path, triton: KernelBackend) -> None:
        EmulatedBackend.__init__(self, library, split_tokens=64)
        self._triton = triton

    _stream = EmulatedBackend._stream
    _attach_workspace = EmulatedBackend._attach_workspace


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rms_norm", "layer_norm"])
def test_logits_are_the_same_bits_alone_in_a_batch_and_in_chunks(
    emulated_library: Path, invariant: InterpretedBackend, config: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"model_type": "gpt2" if config is GPT2 else "llama"}))
    kernels = EmulatedInvariantBackend(emulated_library, invariant)
    assert same_logits(str(path), kernels, LENGTHS, "cpu", torch.float16) == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["smollm2-135m", "opt-125m", "gpt2"])
def test_on_a_gpu_logits_are_the_same_bits(model: str) -> None:
    kernels = select_backend("auto", "cuda", 0, batch_invariant=True)
    assert same_logits(model, kernels, (5, 200, 1, 37, 999, 64)) == 1.0
