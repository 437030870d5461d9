"""Random weights in published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.errors import ModelLoadError
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from engine.loading.dummy_shapes import SHAPES
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.models.paged import prompt_logits

# Parameters as their authors publish them.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
}
TINY = {"tiny", "tiny-gemma3", "tiny-opt", "tiny-gpt2"}
# The KV cache of one token in bytes at 16 bits a number; OPT-13B's 800 KB are the paper's (§3).
KV_BYTES = {"opt-13b": 800 * 1024, "llama-13b": 800 * 1024, "llama-2-70b": 320 * 1024, "gpt2-xl": 300 * 1024}


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - TINY))
def test_sizes_are_the_published_ones(name: str) -> None:
    """Of the weights that the model asks for, and of the arithmetic that needs no model."""
    checkpoint = open_checkpoint(f"dummy:{name}")
    config = checkpoint.model_config()
    assert config.num_parameters == PUBLISHED[name]
    assert checkpoint.num_weight_bytes == PUBLISHED[name] * (4 if config.dtype == "float32" else 2)


@pytest.mark.parametrize("name", sorted(KV_BYTES))
def test_kv_cache_of_a_token(name: str) -> None:
    config = SHAPES[name]
    assert 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim == KV_BYTES[name]


@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_models_load_and_run(name: str) -> None:
    checkpoint = open_checkpoint(f"dummy:{name}")
    config = checkpoint.model_config()
    assert config.num_parameters * 4 == checkpoint.num_weight_bytes
    model = load_model(checkpoint, config, ReferenceBackend(), torch.float32, torch.device("cpu"))
    logits = prompt_logits(model, list(range(1, 9)))
    assert logits.shape == (8, config.vocab_size)
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_weights_are_the_same_each_time_and_differ_between_tensors() -> None:
    first = dict(open_checkpoint("dummy:tiny").weights())
    second = dict(open_checkpoint("dummy:tiny").weights())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["model.layers.0.self_attn.q_proj.weight"], first["model.layers.1.self_attn.q_proj.weight"]
    )
    query = first["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(query) == query.shape[0]
    assert query.std() == pytest.approx(64**-0.5, rel=0.05)


def test_any_config_json_gives_a_model_that_runs(tmp_path: Path) -> None:
    save_hf(hf_model("Qwen3ForCausalLM"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    checkpoint = open_checkpoint(f"dummy:{tmp_path / 'config.json'}")
    config = checkpoint.model_config()
    assert config.architecture == "Qwen3ForCausalLM"
    load_model(checkpoint, config, ReferenceBackend(), torch.float32, torch.device("cpu"))
    assert open_checkpoint(f"dummy:{tmp_path}").fingerprint == checkpoint.fingerprint
    assert checkpoint.fingerprint != open_checkpoint("dummy:tiny").fingerprint
    assert checkpoint.tokenizer() is None


def test_a_broken_config_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelLoadError, match=r"shape\.json: "):
        open_checkpoint(f"dummy:{path}")
