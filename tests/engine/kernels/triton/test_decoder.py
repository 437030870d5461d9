"""A whole model over the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.kernels.backend import KernelBackend
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint
from engine.models import CausalLM
from tests.engine.kernels.triton.interpreter import InterpretedBackend
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.models.paged import PagedRunner, prompt_logits

pytestmark = pytest.mark.slow  # hundreds of launches, each of many milliseconds

PROMPT = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(3)).tolist()
OTHER = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(4)).tolist()


def load(folder: Path, kernels: KernelBackend) -> CausalLM:
    checkpoint = open_checkpoint(str(folder))
    return load_model(checkpoint, checkpoint.model_config(), kernels, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("LlamaForCausalLM"), tmp_path_factory.mktemp("llama"))


def test_logits_equal_the_reference(llama: Path, backend: InterpretedBackend) -> None:
    expected = prompt_logits(load(llama, ReferenceBackend()), PROMPT)
    logits = prompt_logits(load(llama, backend), PROMPT, [11, 1, 8])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_batch_invariant_logits_are_bitwise_equal_alone_in_a_batch_and_in_chunks(
    llama: Path, invariant: InterpretedBackend
) -> None:
    model = load(llama, invariant)
    alone = prompt_logits(model, PROMPT)
    assert torch.equal(prompt_logits(model, PROMPT, [19, 1]), alone)
    runner = PagedRunner(model, num_seqs=2, max_len=len(PROMPT))
    rows = [runner.step([PROMPT[:9], OTHER[:11]])[0], runner.step([PROMPT[9:10], OTHER[11:]])[0]]
    rows.append(runner.step([PROMPT[10:], []])[0])
    assert torch.equal(torch.cat(rows), alone)
