"""Steps recorded on a real engine, and what a native runner's phases become."""

from __future__ import annotations

import time
from typing import Any

import pytest

from benchmarks.cpu.decode import DecodeCase, decode_steps, measure_decode
from benchmarks.cpu.machine import MachineRates
from benchmarks.cpu.requests import make_requests, output_rate
from benchmarks.cpu.roofline import gemm_weights, head_weights
from benchmarks.cpu.steps import NATIVE_PHASES, Probe
from engine import LLM


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("dummy:tiny", kernels="reference", dtype="float32", num_blocks=128, max_model_len=256, num_threads=1)


def test_phases_add_up_to_the_step(llm: LLM) -> None:
    probe = Probe(llm.engine)
    requests = make_requests(4, llm.engine.model_config.vocab_size, 64)
    began = time.perf_counter()
    with probe.recording() as steps:
        output_rate(llm, requests)
    seconds = time.perf_counter() - began
    assert len(steps) == llm.stats().num_steps
    assert sum(step.seconds for step in steps) < seconds
    for step in steps:
        assert sum(step.phases.values()) == pytest.approx(step.seconds)
        assert all(value >= 0.0 for value in step.phases.values())
        assert step.phases["model"] > 0.0 < step.phases["sampling"]
    num_tokens = sum(len(request.prompt) + request.num_output_tokens - 1 for request in requests)
    assert sum(step.output.num_tokens for step in steps) == num_tokens
    output_rate(llm, requests[:1])
    assert len(steps) < llm.stats().num_steps, "nothing is recorded after the end"


def test_sizes_of_the_torch_runner(llm: LLM) -> None:
    probe, model = Probe(llm.engine), llm.engine.model_config
    assert probe.weight_bytes() == {"gemm": 4 * gemm_weights(model), "head": 4 * head_weights(model)}
    assert probe.kv_bytes_per_token() == 4 * 2 * model.num_layers * model.num_kv_heads * model.head_dim


def test_a_native_runners_phases_are_taken_over(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = Probe(llm.engine)._runner
    measured = {"gemm": 4e-6, "head": 2e-6, "attention": 3e-6, "other": 1e-6, "total": 11e-6, "calls": 1}
    resets: list[None] = []
    monkeypatch.setattr(runner, "phase_seconds", lambda: measured, raising=False)
    monkeypatch.setattr(runner, "reset_phases", lambda: resets.append(None), raising=False)
    monkeypatch.setattr(runner, "weight_bytes", lambda: {"gemm": 5, "head": 7}, raising=False)
    monkeypatch.setattr(runner, "kv_bytes_per_token", lambda: 11, raising=False)
    probe = Probe(llm.engine)
    assert (probe.weight_bytes(), probe.kv_bytes_per_token()) == ({"gemm": 5, "head": 7}, 11.0)
    with probe.recording() as steps:
        output_rate(llm, make_requests(2, llm.engine.model_config.vocab_size, 32))
    assert len(resets) == len(steps) > 0
    for step in steps:
        assert tuple(step.phases) == (*NATIVE_PHASES, "sampling", "python")
        assert sum(step.phases[name] for name in NATIVE_PHASES) == pytest.approx(11e-6)
        assert sum(step.phases.values()) == pytest.approx(step.seconds)
        assert step.python_share == pytest.approx((step.seconds - 11e-6) / step.seconds)


@pytest.mark.parametrize("case", [DecodeCase(1, 40, 6), DecodeCase(5, 40, 6)])
def test_decode_steps_are_around_the_context(llm: LLM, case: DecodeCase) -> None:
    steps = decode_steps(llm.engine, Probe(llm.engine), case)
    assert len(steps) == case.num_steps
    lengths = [item.start + 1 for step in steps for item in step.output.scheduled]
    assert abs(sum(lengths) / len(lengths) - case.context) <= 2
    assert all(step.output.num_tokens == case.batch for step in steps)
    assert not llm.engine.has_unfinished_requests
    llm.engine.check_invariants()


def test_prompts_of_many_steps_come_before_the_decode_steps() -> None:
    llm = LLM("dummy:tiny", num_blocks=64, max_model_len=128, max_num_batched_tokens=32, num_threads=1)
    steps = decode_steps(llm.engine, Probe(llm.engine), DecodeCase(4, 60, 5))
    lengths = [item.start + 1 for step in steps for item in step.output.scheduled]
    assert abs(sum(lengths) / len(lengths) - 60) <= 8


def test_a_pool_too_small_for_the_case_is_said() -> None:
    llm = LLM("dummy:tiny", num_blocks=8, max_model_len=64, num_threads=1, num_swap_blocks=0)
    with pytest.raises(ValueError, match="6 sequences of 30 tokens never decoded all together"):
        decode_steps(llm.engine, Probe(llm.engine), DecodeCase(6, 30, 4))


def test_a_decode_case_beside_its_roofline(llm: LLM) -> None:
    readings = iter([MachineRates(1, rate, {"float32": rate}) for rate in (1e9, 2e9, 3e9, 4e9, 5e9)])
    result = measure_decode(llm.engine, DecodeCase(2, 30, 7), lambda: next(readings))
    assert [rates.bytes_per_s for rates in result.machine] == [1e9, 2e9, 3e9, 4e9, 5e9], "of the four parts of 7 steps"
    assert set(result.floor) == {"gemm", "head", "attention"}
    assert result.floor_ratio == pytest.approx(result.step_s / sum(result.floor.values()))
    assert 0.0 < result.python_share < 1.0
    assert measure_decode(llm.engine, DecodeCase(2, 30, 3), None).floor_ratio is None
