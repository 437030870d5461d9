"""Lists of requests: read, made, written, run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cpu.requests import Request, make_requests, output_rate, read_requests, write_requests
from engine import LLM


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    requests = make_requests(12, vocab_size=100, max_model_len=64)
    write_requests(tmp_path / "list.json", requests)
    assert read_requests(tmp_path / "list.json") == requests
    assert (tmp_path / "list.json").read_text().startswith("[[["), "peers read plain pairs"


def test_made_requests_fit_the_model_and_are_the_same_each_time() -> None:
    requests = make_requests(200, vocab_size=50, max_model_len=256)
    assert requests == make_requests(200, vocab_size=50, max_model_len=256)
    assert requests != make_requests(200, vocab_size=50, max_model_len=256, seed=1)
    assert all(len(request.prompt) + request.num_output_tokens <= 256 for request in requests)
    assert all(0 <= token < 50 for request in requests for token in request.prompt)
    assert len({len(request.prompt) for request in requests}) > 20


def test_made_requests_have_the_median_lengths_asked_for() -> None:
    requests = make_requests(400, vocab_size=50, max_model_len=4096, median_tokens=(300, 40))
    assert 270 < sorted(len(request.prompt) for request in requests)[200] < 330
    assert 36 < sorted(request.num_output_tokens for request in requests)[200] < 44


@pytest.mark.parametrize("text", ["{}", "[]", "[[[1, 2]]]", "[[[], 3]]", "[[[1], 0]]", "[[1, 2]]"])
def test_other_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"list\.json"):
        read_requests(path)


def test_the_rate_counts_output_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("dummy:tiny", num_blocks=16, max_model_len=64)
    seconds = iter([10.0, 14.0])
    monkeypatch.setattr("benchmarks.cpu.requests.time.perf_counter", lambda: next(seconds))
    assert output_rate(llm, [Request([1, 2, 3], 5), Request([4], 7)]) == pytest.approx(12 / 4.0)
