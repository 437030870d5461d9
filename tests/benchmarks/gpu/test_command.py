"""What of the GPU benchmark runs without one: its arguments, its refusal, its table and its JSON."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu.__main__ import PARTS, main, parse, run_parts
from benchmarks.gpu.attention import BLOCK_SIZE, CASES, AttentionCase, attend, make_data
from benchmarks.gpu.checks import Check, relative_error
from benchmarks.gpu.peers import PEERS, PeerMissingError, sdpa
from benchmarks.gpu.results import Missing, Rates, Timing, timing_line, timings_json
from engine.kernels.reference import ReferenceBackend

RATES = Rates(copy_bytes_per_s=4e12, flops_per_s=8e14, to_host_bytes_per_s=5e10, to_device_bytes_per_s=4e10)
TIMINGS = [
    Timing("decode", "quire", 100e-6, num_bytes=3.6e8),
    Timing("decode", "FlashInfer", 110e-6, num_bytes=3.6e8),
    Timing("decode", "FlashAttention-3", 105e-6, num_bytes=3.6e8),
    Timing("prefill", "quire", 1e-3, num_bytes=1e6, flops=4.8e11),
    Timing("swap out", "quire", 1e-2, num_bytes=4e8, ceiling="to_host"),
]
MISSING = [Missing("decode", "vLLM Triton", "absent: ModuleNotFoundError: No module named 'vllm'")]


def test_arguments() -> None:
    assert parse([]).only == list(PARTS)
    options = parse(["--only", "attention", "--models", "tiny", "--batch", "4"])
    assert (options.only, options.models, options.batch, options.output_tokens) == (["attention"], ["tiny"], 4, 128)
    for wrong in (["--only", "sleep"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device, and torch finds none"):
        main([])


def test_each_timing_is_held_to_its_own_ceiling() -> None:
    shares = [timing.share(RATES) for timing in TIMINGS]
    assert shares == pytest.approx([0.9, 0.9 / 1.1, 0.9 / 1.05, 0.6, 0.8])


def test_a_part_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object) -> dict[str, object]:
        raise RuntimeError("an illegal memory access was encountered")

    def works(*_: object) -> dict[str, object]:
        return {"figures": [1]}

    result: dict[str, object] = {}
    assert run_parts({"first": fails, "second": works}, result, None, RATES, parse([])) == ["first"]
    assert result["second"] == {"figures": [1]}
    printed = capsys.readouterr().out
    assert "first FAILED: RuntimeError: an illegal memory access" in printed
    assert json.loads(printed.splitlines()[-1]) == {"benchmark": "gpu", "part": "second", "second": {"figures": [1]}}


def test_the_table_names_rates_shares_and_what_is_missing() -> None:
    assert timing_line(TIMINGS[0], RATES).split()[-4:] == ["100.0", "3600", "0.0", "90.0%"]
    assert timing_line(TIMINGS[3], RATES).split()[-2:] == ["480.0", "60.0%"]
    assert "No module named 'vllm'" in timing_line(MISSING[0], RATES)


def test_the_json_object_holds_all_of_it() -> None:
    result = json.loads(json.dumps(timings_json([*TIMINGS, *MISSING], RATES)))
    assert result["timings"][0] == {"name": "decode", "by": "quire", "us": 100.0, "share_of_ceiling": 0.9}
    assert len(result["timings"]) == len(TIMINGS)
    assert result["missing"][0]["by"] == "vLLM Triton"


def test_a_check_that_is_not_a_number_does_not_pass() -> None:
    assert Check("a", 1e-3, 4e-3).passes
    assert not Check("a", float("nan"), 4e-3).passes
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])) == pytest.approx(0.5 / 29.25**0.5)


def test_work_is_counted_from_the_case() -> None:
    decode = AttentionCase("d", 64, 1, 4096)
    assert decode.kv_bytes == 64 * 4096 * 8 * 128 * 2 * 2
    assert decode.pool_bytes == 32 * decode.kv_bytes
    chunk = AttentionCase("p", 1, 3, 5, num_heads=2, head_dim=8)
    assert chunk.flops == 4 * 2 * 8 * (3 + 4 + 5), "row by row what is visible"
    assert all(case.seq_len % BLOCK_SIZE == 0 for case in CASES), "peers with larger pages take whole ones"


@pytest.mark.parametrize("case", [
    AttentionCase("decode", 3, 1, 48, 4, 2, 16, 2), AttentionCase("chunk", 2, 5, 32, 4, 2, 16, 2),
    AttentionCase("prompt", 2, 32, 32, 4, 2, 16, 2),
])  # fmt: skip
def test_a_peer_computes_on_the_same_data(case: AttentionCase) -> None:
    data = make_data(case, device="cpu")
    for index, call in enumerate(sdpa(data)):
        assert relative_error(call(), attend(ReferenceBackend(), data, index)) < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["FlashInfer", "FlashAttention-3", "vLLM Triton"])
def test_an_absent_peer_is_named(name: str) -> None:
    data = make_data(AttentionCase("decode", 1, 1, 16, 2, 2, 16, 2), device="cpu")
    with pytest.raises(PeerMissingError, match=r"absent: \w*Error: "):
        PEERS[name](data)
