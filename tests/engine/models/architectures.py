"""Every architecture, and what its configurations may vary: for tests of all that computes a model."""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-heads": (
        "LlamaForCausalLM",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    ),
    "llama-rope-llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "llama-rope-linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-wide-heads": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-two-windows": (
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gemma3": ("Gemma3ForCausalLM", {}),
    "gemma3-untied-biases": ("Gemma3ForCausalLM", {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3-rope-linear": ("Gemma3ForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3-all-local": ("Gemma3ForCausalLM", {"layer_types": ["sliding_attention"] * 4}),
    "gemma3-all-global": ("Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 4}),
    "gemma3-other-bases": (
        "Gemma3ForCausalLM",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "opt": ("OPTForCausalLM", {}),
    "opt-untied": ("OPTForCausalLM", {"tie_word_embeddings": False}),
    "opt-post-norm": ("OPTForCausalLM", {"do_layer_norm_before": False}),
    "opt-350m": ("OPTForCausalLM", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-projected-pre-norm": ("OPTForCausalLM", {"word_embed_proj_dim": 80, "tie_word_embeddings": False}),
    "opt-without-final-norm": ("OPTForCausalLM", {"_remove_final_layer_norm": True}),
    "opt-without-biases": ("OPTForCausalLM", {"enable_bias": False, "activation_function": "gelu"}),
    "opt-head-dim-80": ("OPTForCausalLM", {"hidden_size": 160, "num_attention_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "gpt2-plain-gelu": ("GPT2LMHeadModel", {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    "gpt2-default-width": ("GPT2LMHeadModel", {"n_inner": None, "n_head": 8}),
}
