"""Each rank reads its part of a checkpoint, whatever the format, and little more than that is ever in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.kernels.decoder_abi import WeightType
from engine.kernels.library import KernelLibrary
from engine.loading import open_checkpoint
from engine.loading.decoder_weights import MatrixSlot, decoder_weights
from engine.loading.packed_weights import WeightPolicy, load_packed_weights
from engine.loading.tensor_part import TensorPart, cut
from engine.parallel import split_decoder
from tests.engine.loading.checkpoints import gguf_names, hf_model, save_hf, write_gguf

HEADS: dict[str, Any] = {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One Llama as safetensors and as GGUF of several types, and a dummy."""
    folder = tmp_path_factory.mktemp("sharded")
    saved = str(save_hf(hf_model("LlamaForCausalLM", intermediate_size=256, **HEADS), folder / "hf"))
    checkpoint = open_checkpoint(saved)
    names = gguf_names(checkpoint.model_config(), dict(checkpoint.weights()))
    kinds = {"attn_output": "Q5_1", "ffn_down": "Q8_0", "ffn_up": "Q4_0", "attn_q": "Q4_1", "output": "F16"}

    def kind(name: str, values: np.ndarray[Any, Any]) -> gguf.GGMLQuantizationType:
        stem = name.removesuffix(".weight").rpartition(".")[2]
        return gguf.GGMLQuantizationType[kinds.get(stem, "F32") if values.ndim == 2 else "F32"]

    packed = write_gguf(folder / "model.gguf", "llama", checkpoint.model_config(), names, quantise=kind)
    return {"safetensors": saved, "gguf": str(packed), "dummy": "dummy:tiny"}


@pytest.mark.parametrize("source", ["safetensors", "gguf", "dummy"])
def test_a_part_is_what_the_whole_has_there(source: str, sources: dict[str, str]) -> None:
    whole = dict(open_checkpoint(sources[source]).weights())
    rng = np.random.default_rng(0)
    for name, tensor in open_checkpoint(sources[source]).tensors():
        assert tensor.shape == tuple(whole[name].shape)
        for dim in range(len(tensor.shape) if "norm" not in name else 0):
            ends = np.sort(rng.choice(tensor.shape[dim] + 1, 4, replace=False)).tolist()
            if "q_proj" in name or "k_proj" in name:  # whole heads, as ranks ask for
                ends = [0, 32, 32, tensor.shape[dim]]
            for stretches in ((range(ends[0], ends[1]),), (range(ends[0], ends[1]), range(ends[2], ends[3]))):
                part = TensorPart(dim, stretches)
                assert torch.equal(tensor.read(part), cut(whole[name], part)), f"{name}, {part}"


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
@pytest.mark.parametrize("quantization", ["none", "native", "int8"])
def test_packed_shards_are_cut_from_the_whole(
    source: str, quantization: str, sources: dict[str, str], library: KernelLibrary
) -> None:
    """Shards of codes too: at borders of 32 their scales are those of the whole. csrc/cpu/packed.h has the layout:
    panels of 16 rows, in which columns, or 32 of them with their scales, follow each other."""
    checkpoint = open_checkpoint(sources[source])
    config = checkpoint.model_config()
    policy = WeightPolicy(quantization, "float32")
    whole = load_packed_weights(checkpoint, config, policy, library, 1).matrices
    starts = {slot.key: slot.first_row for slot in decoder_weights(config).matrices}
    for shard in split_decoder(config, 2):
        found = load_packed_weights(checkpoint, config, policy, library, 1, shard=shard).matrices
        slots: list[MatrixSlot] = list(decoder_weights(config, shard).matrices)
        assert {slot.key for slot in slots} == set(whole)
        for slot in slots:
            row, unit = slot.first_row - starts[slot.key], 1 if found[slot.key].type is WeightType.FLOAT32 else 32
            rows = slice(row // 16, (row + slot.n) // 16)
            columns = slice(slot.first_column // unit, (slot.first_column + slot.k) // unit)
            pair = found[slot.key], whole[slot.key]
            ours, theirs = (matrix.data.reshape(matrix.n // 16, matrix.k // unit, -1) for matrix in pair)
            np.testing.assert_array_equal(ours, theirs[rows, columns], err_msg=slot.key)


def test_shards_have_files_of_their_own(library: KernelLibrary, cache_home: Path) -> None:
    checkpoint = open_checkpoint("dummy:tiny")
    config = checkpoint.model_config()
    before = set((cache_home / "quire" / "packed").glob("*.bin"))
    for shard in (*split_decoder(config, 2), *split_decoder(config, 3)):
        load_packed_weights(checkpoint, config, WeightPolicy("none", "bfloat16"), library, 1, shard=shard)
    assert len(set((cache_home / "quire" / "packed").glob("*.bin")) - before) == 5


LOAD = """
import json, sys, threading, time
import numpy, torch
from pathlib import Path
from engine.kernels.library import load_library
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from engine.loading.packed_weights import WeightPolicy, load_packed_weights
from engine.parallel import split_decoder
from engine.parallel.rank import Rank

torch.set_num_threads(1)
source, how, world_size = sys.argv[1], sys.argv[2], int(sys.argv[3])

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(5e-4)

checkpoint = open_checkpoint(source)
config = checkpoint.model_config()
shard = split_decoder(config, world_size)[0]
import engine.models, engine.loading.gguf_dequantize, safetensors
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
if how == "torch":
    kept = load_model(checkpoint, config, ReferenceBackend(), torch.float32, torch.device("cpu"), rank=Rank(shard))
else:
    library = load_library("cpu").library
    kept = load_packed_weights(checkpoint, config, WeightPolicy("none", "float32"), library, 1, shard=shard)
done = True
watcher.join()
print(json.dumps(max(peak, anonymous()) - before))
"""


def peak_bytes(source: str, how: str, world_size: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, source, how, str(world_size)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """54 MB of weights in float32, no tensor more than 8 of them."""
    shape: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    folder = tmp_path_factory.mktemp("large")
    model = hf_model("LlamaForCausalLM", vocab_size=4096, intermediate_size=1536, tie_word_embeddings=True, **shape)
    saved = str(save_hf(model, folder / "hf"))
    checkpoint = open_checkpoint(saved)
    names = gguf_names(checkpoint.model_config(), dict(checkpoint.weights()))
    kind = gguf.GGMLQuantizationType
    packed = write_gguf(
        folder / "model.gguf",
        "llama",
        checkpoint.model_config(),
        names,
        quantise=lambda _, values: kind.Q8_0 if values.ndim == 2 else kind.F32,
    )
    return {"safetensors": saved, "gguf": str(packed)}


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
@pytest.mark.parametrize("how", ["torch", "native"])
def test_peak_memory_is_a_shards(source: str, how: str, large: dict[str, str]) -> None:
    """Memory of the process' own. What the torch model keeps is float32, the native one's lies in a mapped file."""
    config = open_checkpoint(large[source]).model_config()
    whole, quarter = (peak_bytes(large[source], how, world_size) for world_size in (1, 4))
    weights = 4 * config.num_parameters
    if how == "torch":
        assert whole > 0.9 * weights, "not all of it was loaded"
        assert quarter < 0.25 * weights + 8e6, f"{quarter} bytes at the peak, of {weights}"
    else:
        assert quarter < 8e6, f"{quarter} bytes at the peak, of {weights}"
        assert whole < 0.6 * weights
