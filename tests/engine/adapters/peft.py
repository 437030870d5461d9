"""PEFT folders with random adapters, and the checkpoints that PEFT's merge would make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.adapters import LoraAdapter, read_adapter
from engine.loading import open_checkpoint
from engine.loading.decoder_weights import decoder_linears
from engine.model_config import ModelConfig

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Targets and ranks as they come: all matrices, attention only, one of a fused group, an odd rank.
SHAPES: tuple[tuple[tuple[str, ...], int, dict[str, Any]], ...] = (
    (ALL, 4, {}),
    (("q_proj", "v_proj"), 8, {"lora_alpha": 16}),
    (("up_proj", "down_proj"), 3, {}),
    (("k_proj", "o_proj", "gate_proj"), 20, {"use_rslora": True, "lora_alpha": 10}),
)
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 512,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 160,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "torch_dtype": "float32",
}


def write_base(folder: Path, shape: dict[str, Any] | None = None) -> str:
    """A checkpoint of random weights in float32; its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape or TINY))
    dummy = open_checkpoint(f"dummy:{folder}")
    save_file({name: tensor.read(None).contiguous() for name, tensor in dummy.tensors()}, folder / "model.safetensors")
    return str(folder)


def write_adapter(
    folder: Path, base: str | ModelConfig, seed: int = 0, targets: tuple[str, ...] = ALL, rank: int = 4, **config: Any
) -> str:
    """An adapter of random A and B, large enough to change tokens; its folder. `config` overrides adapter_config.json,
    None leaving a key out."""
    model = open_checkpoint(base).model_config() if isinstance(base, str) else base
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear in decoder_linears(model):
        if linear.tensor.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{linear.tensor}"
            if f"{prefix}.lora_A.weight" in tensors:
                continue
            a = torch.randn(rank, linear.source_columns, generator=generator) / linear.source_columns**0.5
            tensors[f"{prefix}.lora_A.weight"] = a
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(linear.source_rows, rank, generator=generator)
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets), "bias": "none"}
    write_peft(folder, {**written, **config}, tensors)
    return str(folder)


def write_peft(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_file(tensors, folder / "adapter_model.safetensors")


def merge(folder: Path, base: str, adapter: str) -> str:
    """PEFT's merge by hand: `W + scale * B A`, alpha / r or alpha / sqrt(r), into a copy of the base; its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((Path(base) / "config.json").read_bytes())
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    weights = load_file(Path(base) / "model.safetensors")
    factors = load_file(Path(adapter) / "adapter_model.safetensors")
    for name in factors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            delta = factors[f"{module}.lora_B.weight"] @ factors[name] * scale
            tensor = f"{module.removeprefix('base_model.model.')}.weight"
            weights[tensor] = weights[tensor] + (delta.T if config.get("fan_in_fan_out") else delta)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return str(folder)


def read(folder: str, base: str, name: str = "a", max_rank: int = 64) -> LoraAdapter:
    return read_adapter(name, folder, open_checkpoint(base).model_config(), max_rank)


def write_adapters(folder: Path, base: str) -> dict[str, str]:
    """An adapter of each of SHAPES, as `a0`, `a1` and so on; returns their folders by name."""
    return {
        f"a{i}": write_adapter(folder / f"a{i}", base, i, targets, rank, **config)
        for i, (targets, rank, config) in enumerate(SHAPES)
    }
