"""What each architecture calls its weights in a checkpoint: the one thing that ModelConfig does not say of it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WeightNames:
    """Names of a decoder's weights, without ".weight" and ".bias".

    Attributes:
        base_model_prefix: the module that holds all but the head. Checkpoints of the bare decoder, such as the
            published gpt2, leave it out of their names.
        layer: the prefix of one layer, with "{}" for its number; the names from `attention_norm` on follow it.
        qkv: one name a projection, or a single one where the checkpoint has fused them.
        mlp_in: likewise: gate and up, or one.
        transposed: linear layers are stored as `[in, out]`.
        layer_buffers: tensors of a layer that are no weights, as older transformers saved its causal masks.
    """

    base_model_prefix: str
    embed_tokens: str
    layer: str
    final_norm: str
    attention_norm: str
    qkv: tuple[str, ...]
    attention_out: str
    mlp_norm: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    embed_positions: str = ""
    project_in: str = ""
    project_out: str = ""
    attention_out_norm: str = ""
    mlp_out_norm: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    lm_head: str = "lm_head"
    transposed: bool = False
    layer_buffers: tuple[str, ...] = ()


LLAMA = WeightNames(
    base_model_prefix="model",
    embed_tokens="model.embed_tokens",
    layer="model.layers.{}",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    layer_buffers=("self_attn.rotary_emb.inv_freq",),
)
GEMMA3 = replace(
    LLAMA,
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
OPT = WeightNames(
    base_model_prefix="model",
    embed_tokens="model.decoder.embed_tokens",
    embed_positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    layer="model.decoder.layers.{}",
    final_norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    mlp_in=("fc1",),
    mlp_out="fc2",
)
GPT2 = WeightNames(
    base_model_prefix="transformer",
    embed_tokens="transformer.wte",
    embed_positions="transformer.wpe",
    layer="transformer.h.{}",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    transposed=True,
    layer_buffers=("attn.bias", "attn.masked_bias"),
)

# Mistral, Qwen2 and Qwen3 are Llama with a sliding window, biases on q, k and v, or norms on q and k.
WEIGHT_NAMES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Gemma3ForCausalLM": GEMMA3,
    "OPTForCausalLM": OPT,
    "GPT2LMHeadModel": GPT2,
}
