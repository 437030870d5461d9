"""Our decoder against transformers' own, architecture by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams
from engine.errors import ModelLoadError
from engine.kernels.backend import KernelBackend
from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelsUnavailableError
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from engine.models import CausalLM, build_model
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.models.architectures import CASES
from tests.engine.models.paged import PagedRunner, prompt_logits

PROMPT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(3)).tolist()


def load(folder: Path, kernels: KernelBackend | None = None) -> CausalLM:
    checkpoint = open_checkpoint(str(folder))
    kernels = kernels or ReferenceBackend()
    return load_model(checkpoint, checkpoint.model_config(), kernels, torch.float32, torch.device("cpu"))


@pytest.fixture
def cpu_kernels() -> KernelBackend:
    try:
        return CpuBackend(1)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    theirs = hf_model(architecture, **overrides)
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    model = load(save_hf(theirs, tmp_path))
    assert model.config.architecture == architecture
    assert model.config.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())

    logits = prompt_logits(model, PROMPT)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    chunked = prompt_logits(model, PROMPT, [1, 4, 7, 1, 13, 18, 1])
    torch.testing.assert_close(chunked, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_native_kernels_equal_transformers(architecture: str, tmp_path: Path, cpu_kernels: KernelBackend) -> None:
    """Without rotation, and with windows that differ, through the library."""
    theirs = hf_model(architecture)
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    model = load(save_hf(theirs, tmp_path), cpu_kernels)
    torch.testing.assert_close(prompt_logits(model, PROMPT, [9, 1, 35]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "prefix", "buffers"),
    [
        ("OPTForCausalLM", "model.", []),
        (
            "GPT2LMHeadModel",
            "transformer.",
            [f"h.{i}.attn.{name}" for i in range(3) for name in ("bias", "masked_bias")],
        ),
    ],
)
def test_published_folders_of_the_bare_decoder_load(
    architecture: str, prefix: str, buffers: list[str], tmp_path: Path
) -> None:
    """gpt2's names lack the outer module's, and causal masks lie among its weights."""
    folder = save_hf(hf_model(architecture), tmp_path)
    expected = prompt_logits(load(folder), PROMPT)
    weights = load_file(folder / "model.safetensors")
    assert all(name.startswith(prefix) for name in weights)
    bare = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    save_file(bare | {name: torch.ones(1, 1, 8, 8) for name in buffers}, folder / "model.safetensors")
    assert torch.equal(prompt_logits(load(folder), PROMPT), expected)
    save_file(bare | {"h.0.attn.c_attn.scale": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"tensor h\.0\.attn\.c_attn\.scale has no place in "):
        load(folder)


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_greedy_tokens_through_the_engine_equal_transformers(architecture: str, tmp_path: Path) -> None:
    """A max_model_len below the table of positions, chunks, and prompts of several lengths at once."""
    theirs = hf_model(architecture)
    prompts = [PROMPT[:1], PROMPT[1:8], PROMPT[8:], PROMPT[3:40]]
    expected = [
        theirs.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    llm = LLM(
        str(save_hf(theirs, tmp_path)),
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
        num_blocks=64,
        block_size=4,
        max_model_len=100,
        max_num_batched_tokens=16,
        num_threads=1,
    )
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Gemma3ForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel"])
def test_mixed_batches_of_prompts_and_decodes_equal_single_sequences(architecture: str, tmp_path: Path) -> None:
    model = load(save_hf(hf_model(architecture), tmp_path))
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


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_bfloat16_weights_stay_close_to_float32(architecture: str, tmp_path: Path) -> None:
    theirs = hf_model(architecture)
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
