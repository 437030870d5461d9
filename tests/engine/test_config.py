from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, UnsupportedModelError
from tests.engine.doubles import MODEL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 3),
        ("block_size", 512),
        ("block_size", 0),
        ("num_blocks", 0),
        ("dtype", "float64"),
        ("device", "tpu"),
        ("max_model_len", 1),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("gpu_memory_utilization", 1.5),
        ("enable_prefix_caching", "yes"),
        ("preemption", "drop"),
        ("num_swap_blocks", -1),
        ("reservation", "orca"),
        ("batching", "dynamic"),
        ("quantization", "int4"),
        ("kernels", "metal"),
        ("batch_invariant", "yes"),
        ("seed", -1),
        ("num_threads", 0),
        ("tensor_parallel_size", 0),
        ("async_scheduling", "yes"),
        ("cuda_graphs", "no"),
        ("enable_lora", 1),
        ("max_loras", 0),
        ("max_lora_rank", 0),
        ("adapter_memory", 0),
        ("adapters", ["a"]),
        ("adapters", {"a": "x"}),
    ],
)
def test_a_bad_option_is_refused_and_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineConfig.from_dict({field: value})


def test_several_ranks_cannot_schedule_ahead() -> None:
    with pytest.raises(ConfigError, match="async_scheduling=True needs tensor_parallel_size=1, not 2"):
        EngineConfig(tensor_parallel_size=2, async_scheduling=True)
    assert EngineConfig(tensor_parallel_size=2).async_scheduling == "auto", "which is no for them"


def test_an_unknown_option_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown engine option blok_size; known: .*block_size"):
        EngineConfig.from_dict({"blok_size": 16})


def test_model_shapes_are_checked() -> None:
    with pytest.raises(ConfigError, match="no multiple"):
        dataclasses.replace(MODEL, num_heads=3, num_kv_heads=2)
    with pytest.raises(ConfigError, match="hidden_size"):
        dataclasses.replace(MODEL, hidden_size=0)
    with pytest.raises(UnsupportedModelError, match="activation 'gelu' of a gated MLP"):
        dataclasses.replace(MODEL, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match="activation 'silu' of a plain MLP"):
        dataclasses.replace(MODEL, gated_mlp=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding": "alibi"}, "position_embedding='alibi' must be one of rotary, learned"),
        ({"norm": "batch_norm"}, "norm='batch_norm' must be one of rms_norm, layer_norm"),
        ({"norm_placement": "both"}, "norm_placement='both' must be one of pre, post"),
        ({"embedding_dim": 0}, "embedding_dim=0 must be an integer from 1"),
        ({"position_offset": -1}, "position_offset=-1 must be an integer from 0"),
        ({"position_offset": 2}, "position_offset=2 needs learned positions"),
        ({"norm": "layer_norm", "qk_norm": True}, "qk_norm needs norm=rms_norm"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
    ],
)
def test_variants_of_a_decoder_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model config: {message}"):
        dataclasses.replace(MODEL, **change)


def test_prefix_caching_is_off_where_nothing_can_be_shared() -> None:
    assert EngineConfig().prefix_caching
    assert not EngineConfig(enable_prefix_caching=False).prefix_caching
    for reservation in ("orca_max", "orca_pow2", "orca_oracle"):
        assert not EngineConfig.from_dict({"reservation": reservation}).prefix_caching


@pytest.mark.parametrize("option", [{"enable_prefix_caching": True}, {"preemption": "recompute"}])
def test_what_reserved_runs_rule_out_is_refused(option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.* needs reservation=paged.* reservation=orca_max"):
        EngineConfig.from_dict({"reservation": "orca_max", **option})
    EngineConfig.from_dict({"reservation": "paged", **option})
