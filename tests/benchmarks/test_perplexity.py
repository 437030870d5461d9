"""Perplexity: the arithmetic, the cutting, and Quire's against transformers' on a model of random weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import perplexity as command
from benchmarks.cpu.steps import Probe
from benchmarks.perplexity import cut, negative_log_likelihoods, perplexity, reference_text
from engine import LLM, SamplingParams
from engine.errors import ConfigError


def test_likelihoods_are_those_of_the_next_token() -> None:
    torch.manual_seed(0)
    logits, tokens = 9 * torch.randn(150, 37), torch.randint(37, (150,))
    expected = torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:], reduction="none")
    ours = negative_log_likelihoods(logits.numpy(), tokens.int().numpy())
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-12)


def test_perplexity_of_a_coin_is_two() -> None:
    chunks = [np.zeros(length, dtype=np.int32) for length in (2, 70, 65)]
    assert perplexity(lambda tokens: np.full((len(tokens), 2), 7.5, np.float32), chunks) == pytest.approx(2.0)


def test_cutting_keeps_every_token() -> None:
    tokens = np.arange(10, 31, dtype=np.int32)
    assert [run.tolist() for run in cut(tokens, 10)] == [[*range(10, 20)], [*range(20, 30)]], "one token predicts none"
    marked = cut(tokens, 9, [1])
    assert [run.tolist() for run in marked] == [[1, *range(10, 18)], [1, *range(18, 26)], [1, *range(26, 31)]]


def test_the_text_is_long_and_always_the_same() -> None:
    assert len(reference_text()) > 200_000
    assert reference_text() == reference_text()


@pytest.mark.parametrize("budget", [2048, 7])
def test_logits_of_a_whole_sequence_are_those_of_its_steps(budget: int) -> None:
    """Whole and in chunks of the step's budget, equal to what the engine draws from."""
    llm = LLM("dummy:tiny", kernels="reference", dtype="float32", num_blocks=8, max_num_batched_tokens=budget)
    vocab_size = llm.engine.model_config.vocab_size
    tokens = np.arange(3, 40, dtype=np.int32) % vocab_size
    probe = Probe(llm.engine)
    logits = probe.logits(tokens)
    one_token = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, ignore_eos=True)
    assert logits.shape == (37, vocab_size)
    assert logits.dtype == np.float32
    for length in (1, 20, 37):
        (output,) = llm.generate({"prompt_token_ids": tokens[:length].tolist()}, one_token, use_tqdm=False)
        (drawn,) = output.outputs[0].token_ids
        row = logits[length - 1].astype(np.float64)
        assert drawn == row.argmax()
        expected = row.max() - math.log(np.exp(row).sum())
        assert output.outputs[0].cumulative_logprob == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="200 tokens need 13 KV blocks, a sequence has 8"):
        probe.logits(np.zeros(200, dtype=np.int32))


@pytest.mark.slow
def test_float32_equals_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["dtype=float32", "kernels=reference", "quantization=none", "num_threads=1"]
    command.main(["--tokens", "300", "--chunk", "128", *(f"--engine-option={option}" for option in options)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_tokens"] == 300
    assert 1.5 < result["quire"] < 60.0
    assert result["ratio"] == pytest.approx(1.0, abs=1e-4)


def test_bad_arguments_are_refused() -> None:
    for arguments in (["--chunk", "1"], ["--tokens", "0"], ["--engine-option", "dtype"]):
        with pytest.raises(SystemExit):
            command.main(arguments)
