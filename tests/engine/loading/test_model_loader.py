"""Every weight is filled exactly once, and whatever does not fit is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.kernels.reference import ReferenceBackend
from engine.loading import Checkpoint, load_model, open_checkpoint
from engine.loading.tensor_part import CheckpointTensor, cut
from engine.model_config import ModelConfig
from engine.tokenization import Tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


class ListedCheckpoint(Checkpoint):
    """The tiny dummy with its list of weights changed."""

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__("listed", "listed")
        self._weights = list(weights)

    def model_config(self) -> ModelConfig:
        return open_checkpoint("dummy:tiny").model_config()

    def tensors(self) -> Iterator[tuple[str, CheckpointTensor]]:
        for name, weight in self._weights:
            yield name, CheckpointTensor(tuple(weight.shape), partial(cut, weight))

    def tokenizer(self) -> Tokenizer | None:
        return None

    @property
    def num_weight_bytes(self) -> int:
        return sum(weight.nbytes for _, weight in self._weights)

    @property
    def fingerprint(self) -> str:
        return ""


def tiny_weights() -> dict[str, torch.Tensor]:
    return dict(open_checkpoint("dummy:tiny").weights())


def load(weights: Iterable[tuple[str, torch.Tensor]], **options: Any) -> Any:
    checkpoint = ListedCheckpoint(weights)
    config = checkpoint.model_config()
    return load_model(checkpoint, config, ReferenceBackend(), torch.float32, torch.device("cpu"), **options)


def test_shards_land_in_their_rows() -> None:
    weights = tiny_weights()
    layer = load(weights.items()).layers[1]
    prefix = "model.layers.1."
    qkv = torch.cat([weights[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
    gate_up = torch.cat([weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(layer.self_attn.qkv_proj.weight, qkv)
    assert torch.equal(layer.mlp.in_proj.weight, gate_up)
    assert layer.self_attn.qkv_proj.weight.is_contiguous()


def test_progress_runs_to_the_total() -> None:
    weights = tiny_weights()
    calls: list[tuple[int, int]] = []
    load(weights.items(), progress=lambda done, total: calls.append((done, total)))
    total = sum(weight.nbytes for weight in weights.values())
    assert len(calls) == len(weights)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_missing_tensor_is_named() -> None:
    weights = tiny_weights()
    del weights[UP]
    with pytest.raises(ModelLoadError, match=f"listed: missing tensors {UP}$"):
        load(weights.items())


def test_many_missing_tensors_are_counted() -> None:
    with pytest.raises(ModelLoadError, match="and 17 more"):
        load([])


def test_a_doubled_tensor_is_named() -> None:
    weights = tiny_weights()
    with pytest.raises(ModelLoadError, match=f"tensor {UP} occurs twice"):
        load([*weights.items(), (UP, weights[UP])])


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"tensor model\.layers\.2\.x has no place in LlamaForCausalLM"):
        load([*tiny_weights().items(), ("model.layers.2.x", torch.zeros(1))])


def test_a_wrong_shape_is_named() -> None:
    weights = tiny_weights()
    weights[UP] = weights[UP][:-1]
    with pytest.raises(ModelLoadError, match=rf"tensor {UP} has shape \[127, 64\], the configuration says \[128, 64\]"):
        load(weights.items())


def test_stored_tables_and_the_head_of_a_tied_model_are_not_needed() -> None:
    extra = [("lm_head.weight", torch.zeros(512, 64)), ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))]
    model = load([*tiny_weights().items(), *extra])
    assert torch.equal(model.lm_head.weight, tiny_weights()["model.embed_tokens.weight"])


def test_an_architecture_without_a_model() -> None:
    checkpoint = open_checkpoint("dummy:tiny")
    config = dataclasses.replace(checkpoint.model_config(), architecture="BloomForCausalLM")
    with pytest.raises(UnsupportedModelError, match="architecture BloomForCausalLM is not supported; supported: GPT2"):
        load_model(checkpoint, config, ReferenceBackend(), torch.float32, torch.device("cpu"))
