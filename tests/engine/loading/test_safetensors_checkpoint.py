"""Hugging Face folders: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading import open_checkpoint
from tests.engine.loading.checkpoints import hf_model, save_hf


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in one file; tests copy it before they change it."""
    return save_hf(hf_model("LlamaForCausalLM"), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def saved_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("LlamaForCausalLM"), tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_weights_are_those_of_the_file(saved: Path) -> None:
    checkpoint = open_checkpoint(str(saved))
    expected = load_file(saved / "model.safetensors")
    weights = dict(checkpoint.weights())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert checkpoint.num_weight_bytes == sum(weight.nbytes for weight in weights.values())


def test_shards_together_hold_every_weight_once(saved: Path, saved_sharded: Path) -> None:
    names = [name for name, _ in open_checkpoint(str(saved_sharded)).weights()]
    assert sorted(names) == sorted(name for name, _ in open_checkpoint(str(saved)).weights())


def test_the_only_safetensors_file_may_have_any_name(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert len(dict(open_checkpoint(str(folder)).weights())) > 0
    shutil.copy(folder / "weights.safetensors", folder / "more.safetensors")
    with pytest.raises(ModelLoadError, match=r"2 \.safetensors files without model\.safetensors\.index\.json"):
        open_checkpoint(str(folder)).model_config()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(saved: Path, tmp_path: Path, name: str) -> None:
    folder = copy(saved, tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelLoadError, match=f"only pickled weights .*{name}"):
        open_checkpoint(str(folder)).model_config()


def test_no_weights_at_all(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no \.safetensors file"):
        open_checkpoint(str(folder)).model_config()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files_are_found_before_any_weight_is_read(saved: Path, tmp_path: Path, keep: int) -> None:
    folder = copy(saved, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: truncated"):
        open_checkpoint(str(folder)).model_config()


def test_a_header_that_is_no_json(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] = ord("x")
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: malformed safetensors header"):
        open_checkpoint(str(folder)).model_config()


def test_a_shape_that_disagrees_with_its_bytes(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[256,64]', b'"shape":[255,64]', 1))
    with pytest.raises(ModelLoadError, match=r"of shape \[255, 64\] cannot fill"):
        open_checkpoint(str(folder)).model_config()


def test_a_missing_shard_is_named(saved_sharded: Path, tmp_path: Path) -> None:
    folder = copy(saved_sharded, tmp_path)
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ModelLoadError, match=f"{victim.name}: no such file"):
        open_checkpoint(str(folder)).model_config()


def test_an_index_that_names_a_tensor_its_shard_lacks(saved_sharded: Path, tmp_path: Path) -> None:
    folder = copy(saved_sharded, tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"tensor model\.extra\.weight is missing"):
        open_checkpoint(str(folder)).model_config()


def test_an_index_cannot_point_outside_its_folder(saved_sharded: Path, tmp_path: Path) -> None:
    folder = copy(saved_sharded, tmp_path)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ModelLoadError, match="is not a file name"):
        open_checkpoint(str(folder)).model_config()


def test_integer_weights_are_unsupported(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    save_file({"model.norm.weight": torch.ones(4, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"type I8 of tensor model\.norm\.weight is not supported"):
        open_checkpoint(str(folder)).model_config()


def test_the_fingerprint_follows_the_content_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    original = open_checkpoint(str(saved)).fingerprint
    folder = copy(saved, tmp_path)
    assert open_checkpoint(str(folder)).model_config().fingerprint == original

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed = open_checkpoint(str(folder)).fingerprint
    assert changed != original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 9.0}))
    assert open_checkpoint(str(folder)).fingerprint not in (original, changed)
