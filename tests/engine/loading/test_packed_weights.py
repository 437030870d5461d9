"""Packed weights of whole checkpoints: through the model, and as files that processes share."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.errors import ModelLoadError
from engine.kernels.decoder_abi import WeightType
from engine.kernels.library import KernelLibrary, load_library
from engine.loading import Checkpoint, open_checkpoint
from engine.loading.packed_weights import (
    PackedWeights,
    WeightPolicy,
    _Packer,
    has_quantized_weights,
    load_packed_weights,
)
from engine.model_config import ModelConfig
from tests.engine.execution.native import EXACT, Chunk, NativeSteps, alone, native_runner, relative_error, torch_logits
from tests.engine.loading.checkpoints import gguf_names, hf_model, save_hf, write_gguf

ROOT = Path(__file__).parents[3]
PROMPT: list[int] = np.random.default_rng(4).integers(0, 256, 70).tolist()
FLOAT32 = WeightPolicy("none", "float32")
NATIVE = WeightPolicy("native", "float32")
# gguf writes no K types; their columns would have to be 256 besides.
TYPES = {
    "attn_q": "Q4_0",
    "attn_k": "Q4_1",
    "attn_v": "Q5_0",
    "attn_output": "Q5_1",
    "ffn_gate": "Q8_0",
    "ffn_up": "Q5_0",
    "ffn_down": "Q8_0",
    "token_embd": "Q8_0",
    "output": "F16",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quire" / "packed"


@pytest.fixture
def library() -> KernelLibrary:
    library, reason = load_library("cpu")
    if library is None:
        pytest.skip(reason)
    return library


@pytest.fixture
def quantised(tmp_path: Path, library: KernelLibrary) -> str:
    """A Llama whose matrices have all the types that gguf can write."""
    assert library
    folder = save_hf(hf_model("LlamaForCausalLM", tie_word_embeddings=False), tmp_path / "hf")
    checkpoint = open_checkpoint(str(folder))
    config = checkpoint.model_config()

    def kind(name: str, values: np.ndarray[Any, Any]) -> gguf.GGMLQuantizationType:
        stem = name.removesuffix(".weight").rpartition(".")[2]
        return gguf.GGMLQuantizationType[TYPES[stem] if values.ndim == 2 else "F32"]

    names = gguf_names(config, dict(checkpoint.weights()))
    return str(write_gguf(tmp_path / "model.gguf", "llama", config, names, quantise=kind))


def load(library: KernelLibrary, source: str | Checkpoint, policy: WeightPolicy = FLOAT32) -> PackedWeights:
    checkpoint = open_checkpoint(source) if isinstance(source, str) else source
    return load_packed_weights(checkpoint, checkpoint.model_config(), policy, library, num_threads=1)


def test_a_quantised_file_keeps_its_codes(quantised: str, library: KernelLibrary) -> None:
    assert has_quantized_weights(open_checkpoint(quantised))
    assert not has_quantized_weights(open_checkpoint("dummy:tiny"))
    matrices = load(library, quantised, NATIVE).matrices
    found = {key.removeprefix("layers.0."): matrix.type.name for key, matrix in matrices.items() if "s.1" not in key}
    assert found["query"] == "U4"
    assert (found["key"], found["value"], found["attention_out"]) == ("U4_MIN", "U5", "U5_MIN")
    assert (found["gate"], found["embedding"], found["head"]) == ("U8", "U8", "FLOAT32")
    assert {matrix.type for matrix in load(library, quantised, WeightPolicy("int8", "float32")).matrices.values()} == {
        WeightType.U8
    }
    assert {matrix.type for matrix in load(library, quantised, WeightPolicy("none", "bfloat16")).matrices.values()} == {
        WeightType.BFLOAT16
    }


def test_a_quantised_file_computes_what_torch_does(quantised: str) -> None:
    """Exactly when decoded to float32, its permuted Q and K put back; closely in its own codes."""
    expected = torch_logits(quantised, PROMPT)
    exact = native_runner(quantised, **EXACT)
    np.testing.assert_allclose(exact.logits(np.array(PROMPT, np.int32)), expected, atol=1e-4, rtol=1e-4)
    native = native_runner(quantised, quantization="native", dtype="float32", kv_cache_dtype="float32")
    error = relative_error(native.logits(np.array(PROMPT, np.int32)), expected)
    assert 1e-4 < error < 0.04  # rows rounded to 8 bits, and no more than that


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "int8"])
def test_a_quantised_file_is_batch_invariant(kv_cache_dtype: str, quantised: str) -> None:
    options: dict[str, Any] = {"quantization": "native", "dtype": "float32", "kv_cache_dtype": kv_cache_dtype}
    expected = alone(native_runner(quantised, **options), PROMPT)
    steps = NativeSteps(native_runner(quantised, num_threads=2, **options), 3, 80)
    parts = [steps.step([Chunk(0, PROMPT[:1]), Chunk(1, PROMPT[:23]), Chunk(2, PROMPT[9:])])[1]]
    parts.append(steps.step([Chunk(1, PROMPT[23:69]), Chunk(0, PROMPT[3:40])])[0])
    parts.append(steps.step([Chunk(0, [7]), Chunk(2, [8]), Chunk(1, PROMPT[69:])])[2])
    assert np.array_equal(np.concatenate(parts), expected)


def test_fused_and_transposed_tensors_are_cut_apart(tmp_path: Path, library: KernelLibrary) -> None:
    """GPT-2's c_attn is [hidden, 3 × hidden], its biases lie side by side."""
    source = str(save_hf(hf_model("GPT2LMHeadModel"), tmp_path / "hf"))
    weights = load(library, source)
    stored = {name: tensor.float().numpy() for name, tensor in open_checkpoint(source).weights()}
    for i, name in enumerate(("query", "key", "value")):
        assert weights.matrices[f"layers.1.{name}"][1:3] == (64, 64)
        bias = stored["transformer.h.1.attn.c_attn.bias"][64 * i : 64 * (i + 1)]
        assert np.array_equal(weights.vectors[f"layers.1.{name}.bias"], bias)
        # A panel is [k][16].
        panel = weights.matrices[f"layers.1.{name}"].data[: 64 * 16 * 4].view(np.float32).reshape(64, 16)
        assert np.array_equal(panel, stored["transformer.h.1.attn.c_attn.weight"][:, 64 * i : 64 * i + 16])


def test_gemmas_norms_have_one_added(tmp_path: Path, library: KernelLibrary) -> None:
    source = str(save_hf(hf_model("Gemma3ForCausalLM"), tmp_path / "hf"))
    stored = {name: tensor.float().numpy() for name, tensor in open_checkpoint(source).weights()}
    found = load(library, source).vectors["layers.2.query_norm.weight"]
    assert np.array_equal(found, stored["model.layers.2.self_attn.q_norm.weight"] + np.float32(1))


def test_a_file_is_made_once_and_mapped_by_all(cache: Path, library: KernelLibrary) -> None:
    first = load(library, "dummy:tiny")
    assert first.shared
    (path,) = cache.glob("*.bin")
    assert path.name.startswith("dummy-tiny-")
    made = path.stat().st_ino
    second = load(library, "dummy:tiny")
    assert path.stat().st_ino == made
    assert np.array_equal(first.matrices["layers.0.down"].data, second.matrices["layers.0.down"].data)
    load(library, "dummy:tiny", WeightPolicy("int8", "float32"))
    load(library, "dummy:tiny", WeightPolicy("none", "bfloat16"))
    load(library, "dummy:tiny-opt")
    assert len(list(cache.glob("*.bin"))) == 4, "one of them took another's file"
    assert not list(cache.glob("*.partial"))


def test_the_caches_bound_holds_for_packed_weights(
    cache: Path, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(library, "dummy:tiny")
    (path,) = cache.glob("*.bin")
    num_bytes = path.stat().st_blocks * 512
    monkeypatch.setenv("QUIRE_CACHE_BYTES", str(num_bytes + num_bytes // 2))
    with caplog.at_level(logging.WARNING):
        second = load(library, "dummy:tiny", WeightPolicy("int8", "float32"))
        assert second.shared, "half as large: there is room for both"
        third = load(library, "dummy:tiny", NATIVE)
    assert path.is_file(), "mapped weights are in use"
    assert not third.shared, "so that these had no room"
    assert "raise QUIRE_CACHE_BYTES" in caplog.text
    assert first.shared
    del first
    gc.collect()
    assert load(library, "dummy:tiny", NATIVE).shared
    assert not path.exists()


def test_everything_is_aligned_for_vectors(library: KernelLibrary) -> None:
    weights = load(library, "dummy:tiny-opt", WeightPolicy("int8", "float32"))
    for key, matrix in weights.matrices.items():
        assert matrix.data.ctypes.data % 64 == 0, key
    for key, vector in weights.vectors.items():
        assert vector.ctypes.data % 64 == 0, key


def test_two_processes_at_once_share_one_file(cache: Path, library: KernelLibrary) -> None:
    assert library
    code = (
        "import sys, zlib; from engine.kernels.library import load_library; from engine.loading import open_checkpoint;"
        "from engine.loading.packed_weights import WeightPolicy, load_packed_weights;"
        "checkpoint = open_checkpoint('dummy:tiny');"
        "weights = load_packed_weights(checkpoint, checkpoint.model_config(), WeightPolicy('none', 'float32'),"
        "    load_library('cpu').library, 1);"
        "print(weights.shared, zlib.crc32(weights.matrices['layers.1.down'].data.tobytes()))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert said[0] == said[1]
    assert said[0][0] == "True"
    assert len(list(cache.glob("*.bin"))) == 1


def test_where_nothing_can_be_written_they_stay_in_memory(
    tmp_path: Path, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = load(library, "dummy:tiny", NATIVE)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        own = load(library, "dummy:tiny", NATIVE)
    assert not own.shared
    assert "cannot be shared with other processes of this node" in caplog.text
    assert own.matrices.keys() == shared.matrices.keys()
    for key, matrix in own.matrices.items():
        assert matrix[:3] == shared.matrices[key][:3]
        assert np.array_equal(matrix.data, shared.matrices[key].data), key
        assert matrix.data.ctypes.data % 64 == 0, key
    token_ids = np.array(PROMPT, np.int32)
    unshared = native_runner("dummy:tiny", **EXACT).logits(token_ids)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert np.array_equal(native_runner("dummy:tiny", **EXACT).logits(token_ids), unshared)


def test_a_failed_packing_leaves_no_file(cache: Path, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModelLoadError("broken half way")

    with monkeypatch.context() as patch:
        patch.setattr(_Packer, "_pack_matrix", fail)
        with pytest.raises(ModelLoadError, match="half way"):
            load(library, "dummy:tiny")
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert load(library, "dummy:tiny").shared


class _Changed(Checkpoint):
    """A checkpoint whose tensors are changed on the way."""

    def __init__(self, source: str, change: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(source, "changed")
        self._inner = open_checkpoint(source)
        self._change = change

    def model_config(self) -> ModelConfig:
        return self._inner.model_config()

    def tokenizer(self) -> None:
        return None

    def tensors(self) -> Any:
        return self._inner.tensors()

    def stored_tensors(self) -> Any:
        tensors = {tensor.name: tensor for tensor in self._inner.stored_tensors()}
        self._change(tensors)
        return iter(tensors.values())

    num_weight_bytes = 0
    fingerprint = "changed"


DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (DOWN, {"shape": (128, 64)}, r"down_proj\.weight has shape \[128, 64\], the configuration says \[64, 128\]"),
        (DOWN, {"name": "model.layers.0.mlp.up_proj.weight"}, r"up_proj\.weight occurs twice"),
        (DOWN, {"name": "lm_tail.weight"}, r"lm_tail\.weight has no place in LlamaForCausalLM"),
        (DOWN, None, r"missing tensors model\.layers\.0\.mlp\.down_proj\.weight"),
        (DOWN, {"data": np.zeros(64 * 128 * 4 - 4, np.uint8)}, r"down_proj\.weight: pack: source_bytes=32764"),
        (DOWN, {"row_order": np.full(64, 64, np.int32)}, r"down_proj\.weight: pack: row_order=64"),
        (NORM, {"type": "Q8_0"}, r"tensor model\.norm\.weight is Q8_0, expected plain floats"),
    ],
)
def test_what_does_not_fit_is_named(
    name: str, changes: dict[str, Any] | None, message: str, cache: Path, library: KernelLibrary
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensor = tensors.pop(name)
        if changes is not None:
            tensors["changed"] = tensor._replace(**changes)

    with pytest.raises(ModelLoadError, match=message):
        load(library, _Changed("dummy:tiny", change))
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_progress_reaches_its_total(library: KernelLibrary) -> None:
    checkpoint = open_checkpoint("dummy:tiny")
    seen: list[tuple[int, int]] = []
    weights = load_packed_weights(
        checkpoint, checkpoint.model_config(), FLOAT32, library, 1, lambda done, total: seen.append((done, total))
    )
    num_bytes = sum(matrix.data.nbytes for matrix in weights.matrices.values())
    assert seen[-1][0] == seen[-1][1] == num_bytes + sum(vector.nbytes for vector in weights.vectors.values())
    assert seen == sorted(seen)
