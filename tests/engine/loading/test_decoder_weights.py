"""The native engine's table of weights is complete: what the torch model asks for, and each row once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import UnsupportedModelError
from engine.kernels.reference import ReferenceBackend
from engine.loading import open_checkpoint
from engine.loading.decoder_weights import MatrixSlot, VectorSlot, decoder_weights
from engine.loading.dummy_shapes import SHAPES
from engine.model_config import ModelConfig
from engine.models import build_model
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.models.architectures import CASES


def check_complete(config: ModelConfig) -> None:
    table = decoder_weights(config)
    model = build_model(config, ReferenceBackend(), torch.float32, torch.device("meta"))
    wanted = {name: tuple(target.shape) for name, target in model.weight_targets().items()}
    assert table.tensor_shapes() == wanted
    assert table.unused == set(model.unused_weights)
    assert table.base_model_prefix == model.base_model_prefix
    slots: list[MatrixSlot | VectorSlot] = [*table.matrices, *table.vectors]
    assert len({slot.key for slot in slots}) == len(slots)
    read = {slot.tensor: np.zeros(rows_of(slot), dtype=int) for slot in slots}
    for slot in slots:
        rows = slot.n if isinstance(slot, MatrixSlot) else slot.shape[0]
        read[slot.tensor][slot.first_row : slot.first_row + rows] += 1
    assert all((counts == 1).all() for counts in read.values()), "each row of each tensor is read once"


def rows_of(slot: MatrixSlot | VectorSlot) -> int:
    return slot.source_rows if isinstance(slot, MatrixSlot) else slot.tensor_shape[0]


@pytest.mark.parametrize("name", [*sorted(name for name in SHAPES if name.startswith("tiny")), "opt-350m"])
def test_published_shapes(name: str) -> None:
    check_complete(dataclasses.replace(SHAPES[name], num_layers=2, layer_windows=SHAPES[name].layer_windows[:2]))


@pytest.mark.parametrize("case", ["llama-biases", "qwen2", "qwen3", "gemma3-untied-biases", "opt-without-biases"])
def test_options_of_the_architectures(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    folder = save_hf(hf_model(architecture, **overrides), tmp_path)
    check_complete(open_checkpoint(str(folder)).model_config())


def test_another_architecture_is_named() -> None:
    config = dataclasses.replace(SHAPES["tiny"], architecture="MambaForCausalLM")
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        decoder_weights(config)
