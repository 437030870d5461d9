from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.errors import ConfigError, UnsupportedModelError
from engine.model_config import ModelConfig

LLAMA = ModelConfig("LlamaForCausalLM", 128, 64, 96, 3, 4, 2, 16, 256)


def test_one_window_holds_for_all_layers() -> None:
    config = dataclasses.replace(LLAMA, sliding_window=7)
    assert [config.window(layer) for layer in range(3)] == [7, 7, 7]
    assert not any(config.is_local(layer) for layer in range(3)), "without rope_local_theta all layers rotate alike"


def test_layers_may_each_have_a_window_and_local_ones_a_rotary_base() -> None:
    config = dataclasses.replace(LLAMA, layer_windows=(7, 7, None), rope_local_theta=1e4)
    assert [config.window(layer) for layer in range(3)] == [7, 7, None]
    assert [config.is_local(layer) for layer in range(3)] == [True, True, False]


def test_the_attention_scale_is_that_of_the_head_unless_the_model_says_otherwise() -> None:
    assert LLAMA.attention_scale == 0.25
    assert dataclasses.replace(LLAMA, query_scale=0.1).attention_scale == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_windows": (7, None)}, "layer_windows has 2 entries, num_layers=3"),
        ({"layer_windows": (7, 7, None), "sliding_window": 7}, "sliding_window=7 beside layer_windows"),
        ({"layer_windows": (7, 0, None)}, "sliding_window=0 must be an integer from 1"),
        ({"norm_placement": "sandwich", "norm": "layer_norm", "qk_norm": True}, "qk_norm needs norm=rms_norm"),
        ({"norm_placement": "around"}, "norm_placement='around' must be one of pre, post, sandwich"),
        ({"norm": "layer_norm", "norm_weight_offset": 1.0}, "norm_weight_offset=1.0 needs norm=rms_norm"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LLAMA, **changes)


def test_an_activation_that_no_gated_mlp_has_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="activation 'relu' of a gated MLP"):
        dataclasses.replace(LLAMA, hidden_act="relu")
