"""A whole model in 8 bits: logits and tokens are those of float32 arithmetic on rounded weights and rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.kernels.quantized_products import TorchRowKernels
from engine.kernels.reference import ReferenceBackend
from engine.layers import WeightFormat
from engine.loading import load_model, open_checkpoint
from engine.models import CausalLM
from engine.models.decoder import Decoder
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.models.paged import prompt_logits

PROMPT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(3)).tolist()
CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CPU = torch.device("cpu")


class RoundingBackend(ReferenceBackend):
    """Products in float32 of what the codes stand for, but for the head's."""

    def __init__(self, code_type: torch.dtype) -> None:
        super().__init__()
        self._code_type = code_type
        self.head: torch.Tensor | None = None

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if weight is not self.head:
            x, weight = self._round(x), self._round(weight)
        return super().linear(x, weight, bias)

    def _round(self, values: torch.Tensor) -> torch.Tensor:
        largest = 127.0 if self._code_type == torch.int8 else 448.0
        scales = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / largest
        codes = (values / scales).clamp(-largest, largest)
        return (codes.round() if self._code_type == torch.int8 else codes.to(self._code_type).float()) * scales


def models(folder: Path, code_type: torch.dtype) -> tuple[CausalLM, CausalLM]:
    """In 8 bits, and the reference."""
    checkpoint = open_checkpoint(str(folder))
    config = checkpoint.model_config()
    weight_format = WeightFormat(code_type, TorchRowKernels())
    ours = load_model(checkpoint, config, ReferenceBackend(), torch.float32, CPU, weight_format=weight_format)
    rounding = RoundingBackend(code_type)
    reference = load_model(open_checkpoint(str(folder)), config, rounding, torch.float32, CPU)
    assert isinstance(reference, Decoder)
    rounding.head = reference.lm_head.weight
    return ours, reference


@pytest.mark.parametrize("quantization", CODE_TYPES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_logits_are_those_of_the_rounded_model(architecture: str, quantization: str, tmp_path: Path) -> None:
    folder = save_hf(hf_model(architecture), tmp_path)
    ours, reference = models(folder, CODE_TYPES[quantization])
    expected = prompt_logits(reference, PROMPT)
    found = prompt_logits(ours, PROMPT, [1, 17, 20, 7])
    plain = load_model(open_checkpoint(str(folder)), ours.config, ReferenceBackend(), torch.float32, CPU)
    exact = prompt_logits(plain, PROMPT)
    # A value that lies between two codes may take either, which goes on as an error of a code; few do.
    error, rounding = (found - expected).norm() / exact.norm(), (found - exact).norm() / exact.norm()
    assert error < rounding / 4
    assert rounding < (0.05 if quantization == "int8" else 0.15)


@pytest.mark.parametrize("quantization", CODE_TYPES)
def test_greedy_tokens_through_the_engine(quantization: str, tmp_path: Path) -> None:
    folder = save_hf(hf_model("LlamaForCausalLM"), tmp_path)
    _, reference = models(folder, CODE_TYPES[quantization])
    prompts = [PROMPT[:1], PROMPT[3:40]]
    llm = LLM(
        str(folder),
        device="cpu",
        kernels="reference",
        dtype="float32",
        quantization=quantization,
        num_blocks=32,
        block_size=4,
        max_model_len=64,
        max_num_batched_tokens=16,
        num_threads=1,
    )
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 12:
            tokens.append(int(prompt_logits(reference, tokens)[-1].argmax()))
        assert list(output.outputs[0].token_ids) == tokens[len(prompt) :]
