"""config.json and generation_config.json to ModelConfig."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.dummy_shapes import SHAPES
from engine.loading.hf_config import read_hf_config
from engine.model_config import ModelConfig, RopeScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}
LLAMA3_RULE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


# As the authors publish opt-350m and gpt2-xl, without what only training reads.
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 1600,
    "n_head": 25,
    "n_layer": 48,
    "n_positions": 1024,
    "vocab_size": 50257,
}
# As google/gemma-3-270m has it.
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "_sliding_window_pattern": 6,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}


def read(folder: Path, fields: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_hf_config(folder / "config.json", fingerprint="f")


def test_llama_3(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        dtype="bfloat16",
        fingerprint="f",
    )


def test_llama_2_without_kv_heads_is_multi_head(tmp_path: Path) -> None:
    fields = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert read(tmp_path, fields).num_kv_heads == 32


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3_RULE}},
        {"rope_scaling": {"type": "llama3", **LLAMA3_RULE}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_RULE}, "rope_theta": None},
    ],
    ids=["transformers-4", "older", "transformers-5"],
)
def test_llama3_rope_scaling_in_every_spelling(tmp_path: Path, spelling: dict[str, Any]) -> None:
    config = read(tmp_path, LLAMA | spelling)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_rope_parameters_of_kind_default_scale_nothing(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert (config.rope_theta, config.rope_scaling) == (7.0, None)


def test_eos_ids_of_both_files_are_joined(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"eos_token_id": 2}, generation={"eos_token_id": [7, 2]})
    assert config.eos_token_ids == (7, 2)


def test_mistral_window_present_null_and_absent(tmp_path: Path) -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, mistral | {"sliding_window": 100}).sliding_window == 100
    assert read(tmp_path, mistral | {"sliding_window": None}).sliding_window is None
    assert read(tmp_path, mistral).sliding_window == 4096


def test_qwen2_window_only_where_it_is_used(tmp_path: Path) -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 50}
    config = read(tmp_path, qwen | {"use_sliding_window": False})
    assert (config.sliding_window, config.attention_bias, config.attention_out_bias) == (None, True, False)
    used = qwen | {"use_sliding_window": True}
    assert read(tmp_path, used | {"max_window_layers": 32}).sliding_window is None
    assert read(tmp_path, used | {"max_window_layers": 0}).sliding_window == 50
    assert read(tmp_path, used | {"max_window_layers": 20}).layer_windows == (None,) * 20 + (50,) * 12


def test_qwen3_norms_heads_and_has_its_own_head_dim(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024})
    assert (config.qk_norm, config.head_dim) == (True, 128)


@pytest.mark.parametrize(("fields", "name"), [(OPT, "opt-350m"), (GPT2, "gpt2-xl"), (GEMMA3, "gemma-3-270m")])
def test_models_as_published(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    assert read(tmp_path, fields) == dataclasses.replace(SHAPES[name], fingerprint="f")


def test_gemma3_layers_without_layer_types_follow_the_pattern(tmp_path: Path) -> None:
    fields = GEMMA3 | {"layer_types": None}
    assert read(tmp_path, fields).layer_windows == SHAPES["gemma-3-270m"].layer_windows
    every_third = read(tmp_path, fields | {"sliding_window_pattern": 3}).layer_windows
    assert every_third == (512, 512, None) * 6


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5.0, "rope_local_base_freq": 7.0},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
            },
            "rope_theta": None,
            "rope_local_base_freq": None,
        },
    ],
    ids=["transformers-4", "transformers-5"],
)
def test_gemma3_scales_the_rotation_of_global_layers_only(tmp_path: Path, spelling: dict[str, Any]) -> None:
    config = read(tmp_path, GEMMA3 | spelling)
    assert (config.rope_theta, config.rope_scaling) == (5.0, RopeScaling("linear", 8.0))
    assert config.rope_local_theta == 7.0


def test_opt_with_norms_before_and_without_projections(tmp_path: Path) -> None:
    fields = OPT | {"do_layer_norm_before": True, "word_embed_proj_dim": None}
    config = read(tmp_path, fields)
    assert (config.norm_placement, config.final_norm, config.embedding_size) == ("pre", True, 1024)
    assert not read(tmp_path, fields | {"_remove_final_layer_norm": True}).final_norm


def test_gpt2_inner_width_is_four_times_the_hidden_one_unless_given(tmp_path: Path) -> None:
    assert read(tmp_path, GPT2).intermediate_size == 6400
    assert read(tmp_path, GPT2 | {"n_inner": 1000}).intermediate_size == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM is not supported; supported: GPT2LMHeadModel, Gem"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"hidden_act": "gelu"}, "activation 'gelu' of a gated MLP"),
        (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        (OPT | {"activation_function": "silu"}, "activation 'silu' of a plain MLP"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (GEMMA3 | {"attn_logit_softcapping": 50}, "attn_logit_softcapping=50"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA3 | {"layer_types": ["chunked_attention"] * 18}, "layer type 'chunked_attention'"),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_parameters.sliding_attention.rope_type='yarn'",
        ),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_unsupported_models_say_what_and_what_instead(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match="supported: ") as raised:
        read(tmp_path, LLAMA | change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, "architectures=None must name one"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size='4096' is not of type int"),
        ({"hidden_size": True}, "hidden_size=True is not of type int"),
        ({"hidden_size": 4097}, "hidden_size=4097 is no multiple of 32 heads"),
        ({"num_key_value_heads": 5}, "num_heads=32 is no multiple of num_kv_heads=5"),
        ({"num_hidden_layers": 0}, "num_layers=0 must be a positive integer"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3' is not an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor=0.5 must be at least 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor is missing"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
        (OPT | {"ffn_dim": None}, "ffn_dim is missing"),
        (OPT | {"word_embed_proj_dim": 0}, "embedding_dim=0 must be an integer from 1"),
        (OPT | {"enable_bias": 1}, "enable_bias=1 is not of type bool"),
        (GEMMA3 | {"layer_types": ["full_attention"]}, "layer_types=['full_attention'] must be a list of 18 kinds"),
        (GEMMA3 | {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern=0 must be at least 1"),
        (GPT2 | {"n_embd": None}, "n_embd is missing"),
        (GPT2 | {"n_head": 7}, "n_embd=1600 is no multiple of 7 heads"),
    ],
)
def test_malformed_fields_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json: ") as raised:
        read(tmp_path, LLAMA | change)
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json: "):
        read_hf_config(tmp_path / "config.json", "")
