"""The config.json of OPT and of GPT-2: learned positions, layer norms, biases, a plain MLP."""

from __future__ import annotations

from engine.errors import UnsupportedModelError
from engine.loading.config_reader import CommonFields, ConfigReader
from engine.model_config import ModelConfig

_OPT_POSITION_OFFSET = 2  # its table keeps rows for padding, as fairseq's did


def opt_config(reader: ConfigReader, common: CommonFields) -> ModelConfig:
    _refuse_unless(reader, "layer_norm_elementwise_affine", True)
    hidden_size = reader.required("hidden_size", int)
    num_heads = reader.required("num_attention_heads", int)
    bias = reader.get("enable_bias", bool, True)
    pre_norm = reader.get("do_layer_norm_before", bool, True)
    return ModelConfig(
        **common,
        hidden_size=hidden_size,
        intermediate_size=reader.required("ffn_dim", int),
        num_layers=reader.required("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=reader.divided("hidden_size", hidden_size, num_heads),
        max_position_embeddings=reader.required("max_position_embeddings", int),
        norm_eps=1e-5,
        embedding_dim=reader.optional("word_embed_proj_dim", int),
        position_embedding="learned",
        position_offset=_OPT_POSITION_OFFSET,
        norm="layer_norm",
        norm_placement="pre" if pre_norm else "post",
        final_norm=pre_norm and not reader.get("_remove_final_layer_norm", bool, False),
        gated_mlp=False,
        hidden_act=reader.get("activation_function", str, "relu"),
        tie_word_embeddings=reader.get("tie_word_embeddings", bool, True),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
    )


def gpt2_config(reader: ConfigReader, common: CommonFields) -> ModelConfig:
    _refuse_unless(reader, "scale_attn_weights", True)
    _refuse_unless(reader, "scale_attn_by_inverse_layer_idx", False)
    _refuse_unless(reader, "add_cross_attention", False)
    hidden_size = reader.required("n_embd", int)
    num_heads = reader.required("n_head", int)
    return ModelConfig(
        **common,
        hidden_size=hidden_size,
        intermediate_size=reader.get("n_inner", int, 4 * hidden_size),
        num_layers=reader.required("n_layer", int),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=reader.divided("n_embd", hidden_size, num_heads),
        max_position_embeddings=reader.required("n_positions", int),
        norm_eps=reader.get("layer_norm_epsilon", float, 1e-5),
        position_embedding="learned",
        norm="layer_norm",
        gated_mlp=False,
        hidden_act=reader.get("activation_function", str, "gelu_new"),
        tie_word_embeddings=reader.get("tie_word_embeddings", bool, True),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )


def _refuse_unless(reader: ConfigReader, name: str, supported: bool) -> None:
    value = reader.get(name, bool, supported)
    if value != supported:
        raise UnsupportedModelError(f"{reader.path}: {name}={value}", [str(supported)])
