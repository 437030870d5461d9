"""Traces: means and spreads, Poisson arrivals, and the formats of real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper.figures.fig17_chatbot import ConversationLengths
from benchmarks.paper.traces import ALPACA, SHAREGPT, DrawnLengths, LogNormal, load_lengths, poisson_trace
from engine.errors import ConfigError


@pytest.mark.parametrize(("lengths", "means"), [(SHAREGPT, (161.31, 337.99)), (ALPACA, (19.31, 58.45))])
def test_lengths_have_the_papers_means(lengths: DrawnLengths, means: tuple[float, float]) -> None:
    drawn = lengths.draw(200_000, np.random.default_rng(3))
    for values, mean, shape in zip(drawn, means, (lengths.prompt, lengths.output), strict=True):
        assert values.mean() == pytest.approx(mean, rel=0.02)
        assert 1 <= values.min() <= values.max() <= shape.most
        uncut = values[(values > 1) & (values < shape.most)]
        assert np.log(uncut).std() == pytest.approx(shape.sigma, rel=0.2)


def test_arrivals_are_poisson_and_lengths_stay_the_same_at_every_rate() -> None:
    slow, fast = (poisson_trace(SHAREGPT, rate, 4000.0 / rate, seed=1) for rate in (2.0, 8.0))
    gaps = np.diff([0.0, *(request.arrival_s for request in fast)])
    assert gaps.mean() == pytest.approx(1 / 8.0, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 8.0, rel=0.1)
    assert [item[1:] for item in slow] == [item[1:] for item in fast]
    assert slow[99].arrival_s == pytest.approx(4 * fast[99].arrival_s)
    assert poisson_trace(SHAREGPT, 2.0, 10.0, seed=2) != poisson_trace(SHAREGPT, 2.0, 10.0, seed=1)


def test_a_shared_prefix_comes_on_top() -> None:
    plain, shared = (poisson_trace(ALPACA, 1.0, 20.0, seed=0, num_shared=count) for count in (0, 80))
    assert [item.num_prompt_tokens + 80 for item in plain] == [item.num_prompt_tokens for item in shared]
    assert {item.num_shared for item in shared} == {80}


def test_conversations_fill_the_prompt() -> None:
    prompts, outputs = ConversationLengths(SHAREGPT).draw(5000, np.random.default_rng(0))
    assert prompts.max() == outputs.max() == 1024
    assert 0.4 < (prompts == 1024).mean() < 0.9
    assert outputs.mean() == pytest.approx(337.99, rel=0.05)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "etalon.csv",
            "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,18,92,0.08\n1402,711,2113,2\n",
        ),
        ("azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,74,18\n2023-11-16 18:15:50,0,9\n"),
        ("vtc.csv", "req_id,model_dir,adapter_dir,prompt_len,output_len,req_time,prompt_chars\n0,m,a,74,18,0.0,9\n"),
        ("mooncake.jsonl", '{"timestamp": 0, "input_length": 74, "output_length": 18, "hash_ids": [0]}\n'),
    ],
)
def test_published_formats_are_read(tmp_path: Path, name: str, text: str) -> None:
    """Requests without tokens, or of more than 2,048, are left out."""
    path = tmp_path / name
    path.write_text(text)
    lengths = load_lengths(path)
    assert (lengths.prompts.tolist(), lengths.outputs.tolist()) == ([74], [18])
    assert name in lengths.description
    prompts, outputs = lengths.draw(3, np.random.default_rng(0))
    assert (prompts.tolist(), outputs.tolist()) == ([74] * 3, [18] * 3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "has fields x, y"),
        ("a.csv", "prompt_len,output_len\n1,two\n", "request 1.*two"),
        ("a.csv", "prompt_len,output_len\n1\n", "request 1"),
        ("a.csv", "prompt_len,output_len\n3000,1\n", "no request of 1 to 2048 tokens"),
        ("a.csv", "", "no request"),
        ("a.jsonl", "{\n", "line 1 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("a.jsonl", '{"input_length": 4}\n', "known pairs"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_lengths(path)


def test_a_missing_or_binary_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_lengths(tmp_path / "missing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_lengths(tmp_path / "binary.csv")


def test_a_mean_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ConfigError, match="mean=2000"):
        LogNormal(2000, 1.0, 1024)
