from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelLoadError
from tests.engine.adapters.peft import GPT2, read, write_adapter, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


def stored(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_factors_are_the_files_with_the_scale_in_b(base: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, base, 1, ("q_proj", "down_proj"), 4, lora_alpha=6)
    adapter = read(folder, base)
    assert set(adapter.ranks.items()) == {(f"layers.{i}.{name}", 4) for i in (0, 1) for name in ("query", "down")}
    assert adapter.num_elements == 2 * 4 * (64 + 64 + 160 + 64)
    assert adapter.factors("layers.0.key") is None
    factors, tensors = adapter.factors("layers.1.down"), stored(folder)
    assert factors is not None
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(factors.a, tensors[f"{prefix}.lora_A.weight"].numpy())
    np.testing.assert_array_equal(factors.b, tensors[f"{prefix}.lora_B.weight"].numpy() * np.float32(1.5))


def test_ranks_alphas_and_layers_of_their_own(base: str, tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path, base, 1, ("q_proj",), 4, use_rslora=True, lora_alpha=8, layers_to_transform=1,
        rank_pattern={"layers.0.self_attn.q_proj": 9}, alpha_pattern={"self_attn.q_proj": 6},
    )  # fmt: skip
    tensors = {name: value for name, value in stored(folder).items() if ".layers.1." in name}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    factors = read(folder, base).factors("layers.1.query")
    assert factors is not None
    expected = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].numpy() * np.float32(
        6 / 4**0.5
    )
    np.testing.assert_array_equal(factors.b, expected)
    assert read(folder, base).factors("layers.0.query") is None


def test_a_regular_expression_and_the_bare_decoders_names(base: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, base, 1, ("q_proj",), 4, target_modules=r".*\.q_proj")
    renamed = {name.replace("base_model.model.model.", "base_model.model."): t for name, t in stored(folder).items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    assert read(folder, base).ranks == {"layers.0.query": 4, "layers.1.query": 4}


def test_a_fused_matrix_is_cut_into_its_parts(tmp_path: Path) -> None:
    base = write_base(tmp_path / "gpt2", GPT2)
    folder = write_adapter(tmp_path / "a", base, 1, ("c_attn",), 4, fan_in_fan_out=True)
    adapter = read(folder, base)
    parts = [adapter.factors(f"layers.0.{name}") for name in ("query", "key", "value")]
    whole = stored(folder)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].numpy()
    np.testing.assert_array_equal(np.concatenate([part.b for part in parts if part is not None]), whole)


def test_a_known_adapter_outlives_its_folder(base: str, tmp_path: Path) -> None:
    adapter = read(write_adapter(tmp_path, base), base)
    for file in tmp_path.iterdir():
        file.unlink()
    assert adapter.factors("layers.0.query") is not None


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_a_file_that_was_written_to_is_not_read(keep: float, base: str, tmp_path: Path) -> None:
    """Mapped, one that was cut would end the process."""
    adapter = read(write_adapter(tmp_path, base), base)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(bytes(int(len(whole) * keep)))
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors has changed since it was checked"):
        adapter.factors("layers.1.down")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type 'IA3' is not supported; supported: LORA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"bias": "all"}, r"bias='all' is not supported"),
        ({"use_dora": True}, r"use_dora=True is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4' changes the base's weights"),
        ({"r": 0}, r"r=0 must be an integer from 1 on"),
        ({"r": 65}, r"rank 65 of model\.layers\.0\.\S+ is above max_lora_rank=64"),
        ({"r": 5}, r"has shape \[4, 64\], expected \[5, 64\]"),
        ({"lora_alpha": "16"}, r"lora_alpha='16' must be a number"),
        ({"use_rslora": 1}, r"use_rslora=1 must be true or false"),
        ({"target_modules": ["q_proj", "w1"]}, r"'w1' is no linear layer of .* those have down_proj, gate_proj"),
        ({"target_modules": ["embed_tokens"]}, r"'embed_tokens' is no linear layer"),
        ({"target_modules": "("}, r"target_modules: '\(' is no regular expression"),
        ({"target_modules": None}, r"target_modules=None must be a list of module names"),
        ({"target_modules": ["q_proj"]}, r"lora_A\.weight has no place"),
        ({"layers_to_transform": "all"}, r"layers_to_transform='all' must be numbers of layers"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\] must map names"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], error: str, base: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, base)
    path = tmp_path / "adapter_config.json"
    changed = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    with pytest.raises(ModelLoadError, match=f"^adapter a: .*{error}"):
        read(folder, base)


def test_tensors_that_are_missing_or_of_another_base(base: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", base, targets=("q_proj",))
    path, tensors = tmp_path / "a" / "adapter_model.safetensors", stored(folder)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(ModelLoadError, match=rf"adapter_model\.safetensors: tensor {name} is missing"):
        read(folder, base)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, path)
    with pytest.raises(ModelLoadError, match=r"tensor base_model\.model\.lm_head\.lora_A\.weight has no place"):
        read(folder, base)
    save_file({**tensors, name: torch.zeros(48, 4)}, path)
    with pytest.raises(
        ModelLoadError, match=r"has shape \[48, 4\], expected \[64, 4\]: the adapter, made for an unnamed"
    ):
        read(folder, base)
    save_file({key: value.to(torch.int8) for key, value in tensors.items()}, path)
    with pytest.raises(ModelLoadError, match="type I8"):
        read(folder, base)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ModelLoadError, match="truncated or not a safetensors file"):
        read(folder, base)


def test_folders_that_hold_no_adapter(base: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"adapter a: .*nowhere: no such folder"):
        read(str(tmp_path / "nowhere"), base)
    with pytest.raises(ModelLoadError, match=r"adapter_config\.json is missing"):
        read(str(tmp_path), base)
    folder = write_adapter(tmp_path, base)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"adapter_model\.bin: pickled weights are never read"):
        read(folder, base)
