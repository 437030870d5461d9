"""Fits the step-time model to a machine at hand, by timing a real engine's steps on it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution.hardware import Hardware
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

FloatArray = npt.NDArray[np.float64]

# Batches that tell the parameters apart: (sequences, prompt tokens of each). Their prompts are the arithmetic, their
# decodes the weights, many short sequences the cost of a sequence, few long ones that of reading the cache.
_BATCHES = ((1, 16), (1, 256), (4, 16), (16, 16), (4, 256), (1, 768))
_NUM_DECODES = 6
# Seconds a unit at least: a rate that no measured step was bound by stays finite, and its price vanishes.
_NEGLIGIBLE_S = 1e-15


class TimedStep(NamedTuple):
    work: StepWork
    seconds: float


def fit_hardware(engine: LLMEngine, name: str, element_bytes: int) -> Hardware:
    """Hardware whose step-time model agrees with this engine on this machine.

    The engine's own bookkeeping is in the measured times, so the fitted step and sequence costs hold it too. Its
    prefix cache must be off and it must be idle.

    Args:
        element_bytes: of one weight and one cached element, as the engine runs them.

    Raises:
        ConfigError: the engine has a prefix cache, whose hits would make steps cheaper than they look, or is too small
            for any of the batches that are timed.
    """
    if engine.cache_config.enable_prefix_caching:
        raise ConfigError("enable_prefix_caching must be false to fit the step-time model to an engine")
    steps = list(time_steps(engine))
    if not steps:
        raise ConfigError(f"max_model_len={engine.max_model_len} and num_blocks leave no batch to time")
    sequence_s, weights, matrix, kv, attention = _fit(engine, steps, element_bytes)
    return Hardware(
        name=name,
        source=f"fitted to {len(steps)} timed steps of {engine.model_id} on this machine",
        num_devices=1,
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        memory_bandwidth=1.0 / weights,
        kv_bandwidth=1.0 / kv,
        matrix_flops=1.0 / matrix,
        attention_flops=1.0 / attention,
        host_bandwidth=copy_bandwidth(),
        sequence_s=sequence_s,
        element_bytes=element_bytes,
    )


def time_steps(engine: LLMEngine) -> Iterator[TimedStep]:
    """Run each batch, its prompts in one step where the token budget allows, and time every step."""
    for num_seqs, num_prompt_tokens in _BATCHES:
        longest = num_prompt_tokens + _NUM_DECODES + 1
        fits_pool = num_seqs * engine.cache_config.blocks_for(longest) <= engine.cache_config.num_blocks
        if longest > engine.max_model_len or num_seqs > engine.config.max_num_seqs or not fits_pool:
            continue
        if num_seqs * num_prompt_tokens > engine.config.max_num_batched_tokens:
            continue
        yield from _time_batch(engine, num_seqs, num_prompt_tokens)


def _time_batch(engine: LLMEngine, num_seqs: int, num_prompt_tokens: int) -> Iterator[TimedStep]:
    """Equal requests without a prefix in common, so that what each step does is known from outside."""
    rng = np.random.default_rng((num_seqs, num_prompt_tokens))
    params = SamplingParams(max_tokens=_NUM_DECODES + 1, temperature=0.0, ignore_eos=True)
    for index in range(num_seqs):
        prompt = rng.integers(0, engine.model_config.vocab_size, num_prompt_tokens).tolist()
        engine.add_request(EngineRequest(f"fit-{num_seqs}-{num_prompt_tokens}-{index}", prompt, params))
    start, num_new = 0, num_prompt_tokens
    while engine.has_unfinished_requests:
        begin = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - begin
        pairs = num_new * start + num_new * (num_new + 1) // 2
        yield TimedStep(
            StepWork(num_seqs, num_seqs * num_new, num_seqs, num_seqs * (start + num_new), num_seqs * pairs), seconds
        )
        start, num_new = start + num_new, 1


def copy_bandwidth(num_bytes: int = 64 << 20) -> float:
    """Bytes a second of copying within this machine's memory, the best of several: what swapping on a CPU does."""
    source = np.ones(num_bytes, dtype=np.uint8)
    destination = np.zeros_like(source)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(destination, source)
        best = min(best, time.perf_counter() - begin)
    return num_bytes / best


def _fit(engine: LLMEngine, steps: Sequence[TimedStep], element_bytes: int) -> list[float]:
    """Seconds a sequence, a byte of weights, a matrix FLOP, a byte of cache and an attention FLOP.

    A step's fixed cost cannot be told from reading the weights, which every step does once: it is counted there.

    Least squares of relative errors. Which side of each max() a step is on depends on the prices that are sought, so
    the sides are guessed, the prices fitted, and both repeated until the sides stay.
    """
    unit = Hardware("unit", "", 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, element_bytes=element_bytes)
    model = StepTimeModel(engine.model_config, unit, engine.cache_config.block_size)
    works = [step.work for step in steps]
    seconds = np.array([step.seconds for step in steps])
    units = np.array([_units(model, work) for work in works], dtype=np.float64)
    is_prompt = np.array([work.num_tokens > work.num_seqs for work in works])
    by_arithmetic = np.stack([is_prompt, is_prompt])
    prices = np.full(5, _NEGLIGIBLE_S)
    for _ in range(20):
        active = units.copy()
        for side, (bytes_column, flops_column) in zip(by_arithmetic, ((1, 2), (3, 4)), strict=True):
            active[side, bytes_column] = 0.0
            active[~side, flops_column] = 0.0
        prices = np.maximum(_non_negative_least_squares(active / seconds[:, None]), _NEGLIGIBLE_S)
        cost = units * prices
        sides = np.stack([cost[:, 2] > cost[:, 1], cost[:, 4] > cost[:, 3]])
        if (sides == by_arithmetic).all():
            break
        by_arithmetic = sides
    return [float(price) for price in prices]


def _units(model: StepTimeModel, work: StepWork) -> tuple[int, ...]:
    return (
        work.num_seqs,
        model.weight_bytes,
        model.matrix_flops(work),
        model.kv_bytes(work),
        model.attention_flops(work),
    )


def _non_negative_least_squares(columns: FloatArray) -> FloatArray:
    """x >= 0 that brings `columns @ x` closest to ones: coordinate descent, exact for so few unknowns."""
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0.0] = 1.0
    normed = columns / scale
    gram, target = normed.T @ normed, normed.sum(axis=0)
    x = np.zeros(columns.shape[1])
    for _ in range(20_000):
        before = x.copy()
        for i in range(len(x)):
            if gram[i, i] > 0.0:
                x[i] = max(0.0, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
        if np.abs(x - before).max() < 1e-12:
            break
    result: FloatArray = x / scale
    return result
