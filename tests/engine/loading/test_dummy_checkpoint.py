"""Random weights in published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.errors import ModelLoadError
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from engine.loading.dummy_checkpoint import SHAPES
from tests.engine.loading.checkpoints import hf_model, save_hf

# Parameters as their authors publish them.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"tiny"}))
def test_sizes_are_the_published_ones(name: str) -> None:
    assert open_checkpoint(f"dummy:{name}").num_weight_bytes == 2 * PUBLISHED[name]


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
