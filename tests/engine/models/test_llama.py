"""Our decoder against transformers' own, architecture by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from engine.models import CausalLM, build_model
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.models.paged import PagedRunner, prompt_logits

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
}
PROMPT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(3)).tolist()


def load(folder: Path) -> CausalLM:
    checkpoint = open_checkpoint(str(folder))
    return load_model(checkpoint, checkpoint.model_config(), ReferenceBackend(), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    theirs = hf_model(architecture, **overrides)
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    model = load(save_hf(theirs, tmp_path))
    assert model.config.architecture == architecture

    logits = prompt_logits(model, PROMPT)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    chunked = prompt_logits(model, PROMPT, [1, 4, 7, 1, 13, 18, 1])
    torch.testing.assert_close(chunked, expected, atol=1e-4, rtol=1e-4)


def test_mixed_batches_of_prompts_and_decodes_equal_single_sequences(tmp_path: Path) -> None:
    model = load(save_hf(hf_model("Qwen3ForCausalLM"), tmp_path))
    prompts = [PROMPT[:9], PROMPT[9:30], PROMPT[30:]]
    expected = [prompt_logits(model, prompt) for prompt in prompts]

    runner = PagedRunner(model, num_seqs=3, max_len=24)
    steps = [(3, 0, 15), (1, 20, 0), (5, 1, 0)]
    rows: list[list[torch.Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for sizes in steps:
        chunks = [prompts[i][done[i] : done[i] + size] for i, size in enumerate(sizes)]
        for i, logits in enumerate(runner.step(chunks)):
            rows[i].append(logits)
            done[i] += sizes[i]
    for i in range(3):
        torch.testing.assert_close(torch.cat(rows[i]), expected[i], atol=1e-4, rtol=1e-4)


def test_sharded_and_whole_folders_load_the_same_weights(tmp_path: Path) -> None:
    theirs = hf_model("LlamaForCausalLM")
    whole = save_hf(theirs, tmp_path / "whole")
    sharded = save_hf(theirs, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(prompt_logits(load(whole), PROMPT), prompt_logits(load(sharded), PROMPT))


def test_bfloat16_weights_stay_close_to_float32(tmp_path: Path) -> None:
    theirs = hf_model("LlamaForCausalLM")
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    checkpoint = open_checkpoint(str(save_hf(theirs.bfloat16(), tmp_path)))
    config = checkpoint.model_config()
    assert config.dtype == "bfloat16"
    model = load_model(checkpoint, config, ReferenceBackend(), torch.bfloat16, torch.device("cpu"))
    logits = prompt_logits(model, PROMPT)
    assert logits.dtype == torch.float32
    error = (logits - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05  # rounded, and no more than that


def test_two_pools_do_not_mix(tmp_path: Path) -> None:
    """The per-layer views are kept between steps: a second pool must not be read through the first one's."""
    model = load(save_hf(hf_model("LlamaForCausalLM"), tmp_path))
    first, second = (PagedRunner(model, num_seqs=1, max_len=16) for _ in range(2))
    first.step([PROMPT[:8]])
    second.step([PROMPT[20:28]])
    expected = prompt_logits(model, PROMPT[:9])[-1:]
    torch.testing.assert_close(first.step([PROMPT[8:9]])[0], expected, atol=1e-5, rtol=1e-5)


def test_tied_head_shares_the_embedding() -> None:
    config = open_checkpoint("dummy:tiny").model_config()
    model: Any = build_model(config, ReferenceBackend(), torch.float32, torch.device("cpu"))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in model.weight_targets()
