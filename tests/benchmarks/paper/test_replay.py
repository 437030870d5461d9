"""The open loop on a virtual clock, its meters, and the search for the sustained rate."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.paper.observers import BatchMeter, Window
from benchmarks.paper.replay import replay
from benchmarks.paper.runs import Run, RunResult, Workload, simulate
from benchmarks.paper.setups import OPT_13B, ORCA_ORACLE, PAGED, STATIC, build_engine
from benchmarks.paper.sweep import sweep
from benchmarks.paper.traces import ALPACA, TraceRequest
from engine.sampling_params import SamplingParams


def sampling(request: TraceRequest) -> SamplingParams:
    return SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0, ignore_eos=True)


def test_requests_arrive_on_time_and_wait_for_the_step_that_runs() -> None:
    engine, executor = build_engine(OPT_13B, PAGED)
    trace = [TraceRequest(1.0, 32, 1), TraceRequest(50.0, 32, 1), TraceRequest(50.001, 32, 1)]
    steps: list[tuple[float, float]] = []
    result = replay(engine, executor.clock, trace, sampling, observe=[lambda begin, end: steps.append((begin, end))])
    seconds = executor.step_time.seconds(executor.last_work)
    assert [begin for begin, _ in steps] == pytest.approx([1.0, 50.0, 50.0 + seconds])
    assert result.normalized_latencies == pytest.approx([seconds, seconds, 2 * seconds - 0.001])
    assert result.duration_s == pytest.approx(50.0 + 2 * seconds)
    assert result.num_steps == result.num_output_tokens == 3


def test_normalized_latency_divides_by_the_output() -> None:
    engine, executor = build_engine(OPT_13B, PAGED)
    result = replay(engine, executor.clock, [TraceRequest(0.0, 16, 20)], sampling)
    assert result.mean_normalized_latency == pytest.approx(executor.busy_s / 20)


def test_a_hopeless_replay_is_cut_short() -> None:
    trace = [TraceRequest(0.0, 100, 200) for _ in range(120)]
    engine, executor = build_engine(OPT_13B, PAGED)
    whole = replay(engine, executor.clock, trace, sampling)
    engine, executor = build_engine(OPT_13B, PAGED)
    cut = replay(engine, executor.clock, trace, sampling, bound=0.5 * whole.mean_normalized_latency)
    assert (cut.exceeded, whole.exceeded) == (True, False)
    assert cut.num_steps < whole.num_steps
    engine, executor = build_engine(OPT_13B, PAGED)
    assert not replay(engine, executor.clock, trace, sampling, bound=1.01 * whole.mean_normalized_latency).exceeded


def test_meters_count_only_the_window() -> None:
    _, executor = build_engine(OPT_13B, PAGED)
    meter = BatchMeter(executor, Window(10.0, 20.0))
    for begin, end, num_seqs in ((0.0, 11.0, 4), (11.0, 12.0, 8), (19.0, 40.0, 16), (40.0, 50.0, 100)):
        executor.last_work = executor.last_work._replace(num_seqs=num_seqs)
        meter(begin, end)
    assert meter.mean == pytest.approx((4 + 8 + 16) / 3)
    assert Window.of([TraceRequest(1.0, 1, 1), TraceRequest(30.0, 1, 1)]) == (6.0, 30.0)


def test_paging_beats_orca_and_orca_beats_static_batching() -> None:
    run = Run(OPT_13B, PAGED, Workload("Alpaca", ALPACA), rate=45.0, duration_s=20.0)
    paged, oracle, static = (
        simulate(dataclasses.replace(run, system=system)) for system in (PAGED, ORCA_ORACLE, STATIC)
    )
    assert paged.normalized_latency < oracle.normalized_latency < static.normalized_latency
    assert paged.num_batched > oracle.num_batched
    assert paged.memory["token states"] > 1.2 * oracle.memory["token states"]
    assert simulate(run) == paged


@pytest.mark.parametrize("saturated_rate", [2.0, 3.0, 3.3])
def test_the_search_finds_the_sustained_rate(saturated_rate: float) -> None:
    """A system whose latency passes half a second a token at 3 requests/s."""
    tried: list[float] = []

    def fake(run: Run) -> RunResult:
        tried.append(run.rate)
        return RunResult(run.rate, 1, run.rate / 6.0, run.rate > 6.0, 0.0, 0, 0, 0, 0.0, {})

    run = Run(OPT_13B, PAGED, Workload("Alpaca", ALPACA), 0.0, 1.0)
    curve = sweep(run, saturated_rate, (0.5, 0.9, 1.1), fake)
    assert curve.sustained_rate == pytest.approx(3.0)
    assert curve.saturated_rate == saturated_rate
    assert [item.rate for item in curve.results] == sorted(tried)


def test_a_point_that_was_cut_short_is_approached() -> None:
    """A system without a latency between the bound and the chart's end."""

    def fake(run: Run) -> RunResult:
        return RunResult(run.rate, 1, 0.1, run.rate > 3.0, 0.0, 0, 0, 0, 0.0, {})

    curve = sweep(Run(OPT_13B, PAGED, Workload("Alpaca", ALPACA), 0.0, 1.0), 2.0, (0.5, 1.0, 4.0), fake)
    assert 3.0 / 1.1 <= curve.sustained_rate <= 3.0
    assert [item.exceeded for item in curve.results][-2:] == [False, True]


def test_nothing_is_sustained_by_a_system_that_is_always_too_slow() -> None:
    def fake(run: Run) -> RunResult:
        return RunResult(run.rate, 1, 9.0, True, 0.0, 0, 0, 0, 0.0, {})

    curve = sweep(Run(OPT_13B, PAGED, Workload("Alpaca", ALPACA), 0.0, 1.0), 1.0, (0.5, 1.0), fake)
    assert (curve.sustained_rate, len(curve.results)) == (0.0, 1)
