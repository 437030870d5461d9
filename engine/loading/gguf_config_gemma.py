"""What Gemma 3's GGUF files say, and what they leave to whoever reads them.

llama.cpp knows the pattern of the local layers, their rotary base and the factor on the scores from the architecture
alone; newer files have keys for some of them.
"""

from __future__ import annotations

import dataclasses

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.gguf_reader import GGUFFile
from engine.model_config import ModelConfig

_SLIDING_WINDOW_PATTERN = 6  # every sixth layer sees all
_NUM_LAYERS_27B = 62  # the one size whose scores are not scaled by its heads' dimension
_END_OF_TURN = "<end_of_turn>"


def as_gemma3(file: GGUFFile, config: ModelConfig) -> ModelConfig:
    """The configuration read as if it were Llama's, with what makes it Gemma 3's."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = file.get(f"gemma3.{name}", float)
        if value:
            raise UnsupportedModelError(f"{file.path}: gemma3.{name}={value}", ["0"])
    if config.num_layers == _NUM_LAYERS_27B:
        query_scale = (config.hidden_size // config.num_heads) ** -0.5
    else:
        query_scale = config.head_dim**-0.5
    return dataclasses.replace(
        config,
        rope_theta=file.get("gemma3.rope.freq_base", float) or 1e6,
        rope_local_theta=file.get("gemma3.rope.freq_base_swa", float) or 1e4,
        embedding_scale=config.hidden_size**0.5,
        norm_placement="sandwich",
        hidden_act="gelu_pytorch_tanh",
        qk_norm=True,
        query_scale=query_scale,
        sliding_window=None,
        layer_windows=_layer_windows(file, config),
        eos_token_ids=_eos_token_ids(file, config),
    )


def _layer_windows(file: GGUFFile, config: ModelConfig) -> tuple[int | None, ...]:
    """`sliding_window_pattern` is the distance of global layers, or says of each layer whether it is local."""
    window = config.sliding_window
    key = "gemma3.attention.sliding_window_pattern"
    pattern = file.metadata.get(key, _SLIDING_WINDOW_PATTERN)
    if isinstance(pattern, list) and len(pattern) == config.num_layers:
        return tuple(window if local else None for local in pattern)
    if not isinstance(pattern, int) or pattern < 1:
        raise ModelLoadError(f"{file.path}: metadata {key}={pattern!r} must be positive, or a list of all layers")
    return tuple(window if (i + 1) % pattern else None for i in range(config.num_layers))


def _eos_token_ids(file: GGUFFile, config: ModelConfig) -> tuple[int, ...]:
    """Files that name the end of the text only mean the end of the turn too; llama.cpp finds it by its spelling."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if file.get("tokenizer.ggml.eot_token_id", int) is not None or not isinstance(tokens, list):
        return config.eos_token_ids
    end_of_turn = (tokens.index(_END_OF_TURN),) if _END_OF_TURN in tokens else ()
    return tuple(dict.fromkeys(config.eos_token_ids + end_of_turn))
