from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from app.replica.load import RateMeter, load_report
from engine.adapters import AdapterStats
from engine.outputs import EngineStats

IDLE = EngineStats(100, 100, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Run:
    """A simulated engine whose step lasts `base + sequence_s * batch + prompt / rate` seconds, or if it `overlaps` as
    long as the longer of its prompt and the rest."""

    def __init__(self, base_s: float, sequence_s: float, rate: float, *, overlaps: bool = False) -> None:
        self.meter = RateMeter()
        self.overlaps = overlaps
        self.cost = (base_s, sequence_s, rate)
        self.now_s = 10.0
        self.steps = self.running = self.held = self.drawn = 0

    def step(self, batch: int, prompt: int = 0) -> None:
        base_s, sequence_s, rate = self.cost
        decode_s, prompt_s = base_s + sequence_s * batch, prompt / rate
        self.now_s += max(decode_s, prompt_s) if self.overlaps else decode_s + prompt_s
        self.steps += 1
        self.running = batch
        self.held += batch + prompt
        self.drawn += batch
        stats = EngineStats(100, 50, 0, batch, 0, self.held, 0, self.steps, 0, 0, self.drawn)
        self.meter.observe(stats, self.now_s)


def test_rates_are_unknown_until_measured() -> None:
    meter = RateMeter()
    meter.observe(IDLE, 1.0)
    meter.observe(IDLE, 2.0)
    assert (meter.prefill_tokens_per_s, meter.decode_step_s, meter.decode_sequence_s) == (0.0, 0.0, 0.0)


def test_a_step_is_split_into_its_base_and_its_sequences() -> None:
    run = Run(base_s=0.02, sequence_s=0.001, rate=1000.0)
    for batch in (1, 2, 4, 8, 16, 16, 24, 32):
        run.step(batch)
        run.step(batch)
    assert run.meter.decode_sequence_s == pytest.approx(0.001, rel=0.05)
    assert 0.02 < run.meter.decode_step_s < 0.06


def test_one_batch_size_tells_no_slope() -> None:
    run = Run(base_s=0.02, sequence_s=0.001, rate=1000.0)
    for _ in range(20):
        run.step(1)
    assert run.meter.decode_sequence_s == 0.0
    assert run.meter.decode_step_s == pytest.approx(0.021)


def test_the_prefill_rate_has_what_a_step_takes_besides_and_counts_tokens_not_steps() -> None:
    run = Run(base_s=0.02, sequence_s=0.001, rate=1000.0)
    for _ in range(5):
        run.step(4)
    for _ in range(20):
        run.step(4, prompt=500)
        # A short last chunk, slow for its tokens.
        run.step(4, prompt=16)
    assert run.meter.prefill_tokens_per_s == pytest.approx(500 / 0.524, rel=0.01)


def test_decodes_that_cost_a_step_nothing_but_room_do_not_make_prompts_seem_fast() -> None:
    # Each step lasts 40 ms and has 24 tokens, whatever they are of.
    run = Run(base_s=0.04, sequence_s=0.0, rate=math.inf)
    for _ in range(10):
        run.step(4)
    for _ in range(30):
        run.step(4, prompt=20)
    assert run.meter.prefill_tokens_per_s == pytest.approx(20 / 0.04)


def test_capacity_is_that_of_steps_full_of_prompts_and_counts_tokens_not_steps() -> None:
    run = Run(base_s=0.02, sequence_s=0.001, rate=1000.0)
    assert run.meter.prompt_capacity(500) == 0.0
    for _ in range(5):
        run.step(4)
    for _ in range(20):
        run.step(4, prompt=500)
        # Short last chunks, which a step's fixed time makes slow.
        run.step(4, prompt=16)
    # 0.024 s of decoding and 0.5 s of prompt.
    assert run.meter.prompt_capacity(500) == pytest.approx(500 / 0.524, rel=0.05)


@pytest.mark.parametrize("batch", [1, 4])
def test_capacity_of_steps_that_last_the_same_with_and_without_prompt_is_their_token_budget(batch: int) -> None:
    # Each step lasts 40 ms and has 24 tokens, whatever they are of.
    run = Run(base_s=0.04, sequence_s=0.0, rate=math.inf)
    for _ in range(10):
        run.step(batch)
    for _ in range(30):
        run.step(batch, prompt=24 - batch)
        run.step(batch, prompt=17)
    assert run.meter.prompt_capacity(24) == pytest.approx((24 - batch) / 0.04, rel=0.05)


def test_capacity_where_a_step_is_as_long_as_its_decodes_or_its_prompts() -> None:
    # None of these steps is full; on a CPU, where both add up, 293 ms would be the best guess for a full one.
    run = Run(base_s=0.02, sequence_s=0.0, rate=6000.0, overlaps=True)
    for prompt in (300, 900, 500, 1200, 60, 700) * 5:
        run.step(8)
        run.step(8, prompt=prompt)
    assert run.meter.prompt_capacity(2048) == pytest.approx(6000.0, rel=0.1)


@pytest.mark.parametrize("prompt", [40, 400, 2000])
def test_capacity_where_all_prompts_are_of_one_length_is_that_of_their_steps_and_what_decodes_add(prompt: int) -> None:
    run = Run(base_s=0.02, sequence_s=0.001, rate=1000.0)
    for _ in range(10):
        run.step(8)
        run.step(8, prompt=prompt)
    assert run.meter.prompt_capacity(2048) == pytest.approx(2040 / (0.028 + 2.04), rel=0.05)


def test_what_small_steps_tell_of_large_ones_is_not_believed_without_bound() -> None:
    run = Run(base_s=0.02, sequence_s=0.0, rate=6000.0, overlaps=True)
    for prompt in (20, 60, 40) * 10:
        run.step(8)
        run.step(8, prompt=prompt)
    # That prompts cost nothing is what was seen.
    assert 6000.0 < run.meter.prompt_capacity(2048) < 12000.0


def test_a_budget_that_decodes_fill_has_no_capacity() -> None:
    run = Run(base_s=0.02, sequence_s=0.0, rate=1000.0)
    for _ in range(10):
        run.step(8, prompt=16)
    assert run.meter.prompt_capacity(8) == 0.0


def test_idle_time_is_not_measured() -> None:
    run = Run(base_s=0.02, sequence_s=0.001, rate=1000.0)
    for _ in range(5):
        run.step(4)
    before = run.meter.decode_step_s
    run.meter.observe(EngineStats(100, 100, 0, 0, 0, 0, 0, run.steps, 0, 0, run.drawn), run.now_s)
    run.now_s += 100.0
    run.held = 0
    run.step(4)
    assert run.meter.decode_step_s == before


def test_a_report_says_which_adapters_are_there_and_what_a_load_takes() -> None:
    stats = replace(IDLE, adapters=AdapterStats(4, 1, ("sql", "chat"), 4096, 1, 2.0))
    report = load_report(stats, RateMeter(), 0.0, ())
    assert (report.adapters, report.num_free_adapter_slots, report.adapter_load_s) == (("sql", "chat"), 1, 0.5)
    assert load_report(IDLE, RateMeter(), 0.0, ()).adapter_load_s == 0.0


def test_noise_is_told_as_the_rates_errors() -> None:
    draw = random.Random(0)
    exact, noisy = Run(0.02, 0.001, 1000.0), Run(0.02, 0.001, 1000.0)
    for _ in range(60):
        for run in (exact, noisy):
            batch = draw.choice((1, 8, 16, 32))
            if run is noisy:
                run.now_s += draw.uniform(0.0, 0.02)
            run.step(batch)
            if run is noisy:
                run.now_s += draw.uniform(0.0, 0.2)
            run.step(batch, prompt=500)
    assert exact.meter.decode_sequence_error_s < 0.05 * exact.meter.decode_sequence_s
    assert noisy.meter.decode_sequence_error_s > 0.05 * noisy.meter.decode_sequence_s
    assert abs(noisy.meter.decode_sequence_s - 0.001) < 4 * noisy.meter.decode_sequence_error_s
    assert noisy.meter.prefill_error > 0.01 * noisy.meter.prefill_tokens_per_s


def test_a_single_sample_is_all_error() -> None:
    run = Run(0.02, 0.001, 1000.0)
    run.step(2)
    run.step(2, prompt=500)
    assert run.meter.prefill_error == run.meter.prefill_tokens_per_s > 0
    assert load_report(IDLE, run.meter, 0.0, ()).prefill_error == run.meter.prefill_error
