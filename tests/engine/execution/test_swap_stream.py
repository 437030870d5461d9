"""Swaps beside the computation: right in whatever order two streams may run, and wrong without any of the waits."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from engine.config import CacheConfig, EngineConfig
from engine.engine import LLMEngine
from engine.execution.swap_stream import SwapStream
from engine.memory import BlockCopy
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.scheduling import SamplerOutput, SchedulerOutput
from tests.engine.doubles import MODEL, CheckingDevice, CheckingStep, expected_tokens, run_to_end


class Event:
    def __init__(self) -> None:
        self.has_happened = False

    def happen(self) -> None:
        self.has_happened = True


class FakeStream:
    """Work that runs in order, some time."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()

    def add(self, work: Callable[[], object]) -> None:
        self.queue.append((lambda: True, work))

    def record_event(self) -> Event:
        event = Event()
        self.add(event.happen)
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append((lambda: event.has_happened, lambda: None))

    @property
    def can_run(self) -> bool:
        return bool(self.queue) and self.queue[0][0]()

    def run_one(self) -> None:
        self.queue.popleft()[1]()


class StreamedDevice(CheckingDevice):
    """A CheckingDevice with a stream for swaps and one for all else, which take turns at random."""

    def __init__(self, cache: CacheConfig, config: EngineConfig, seed: int, swaps: type[SwapStream]) -> None:
        super().__init__(cache, config)
        self._random = random.Random(seed)
        self.swap, self.compute = FakeStream(), FakeStream()
        self._current = self.compute
        self._swaps = swaps(self.swap, lambda: self.compute, self._use, self._move)
        self._done: dict[int, SamplerOutput] = {}
        self.num_overlaps = 0  # swaps that ran while the step before was still to run

    @contextlib.contextmanager
    def _use(self, stream: Any) -> Iterator[None]:
        self._current = stream
        yield
        self._current = self.compute

    def _move(self, copies: Sequence[BlockCopy], to_host: bool) -> None:
        num_before = len(self._steps)

        def move() -> None:
            self.num_overlaps += len(self._steps) > 1 and num_before == 1
            if to_host:
                for copy in copies:
                    self._host[copy.destination] = self._pool[copy.source]
            else:
                for copy in copies:
                    self._pool[copy.destination] = self._host[copy.source]
                    self._host[copy.source] = -1

        self._current.add(move)

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        def copy_all() -> None:
            for copy in copies:
                self._pool[copy.destination] = self._pool[copy.source]

        self.compute.add(copy_all)

    def submit(self, output: SchedulerOutput) -> CheckingStep:
        self._swaps.begin_step(output.blocks_to_swap_out, output.blocks_to_swap_in, output.blocks_to_copy, self._copy)
        step = super().submit(
            dataclasses.replace(output, blocks_to_swap_out=(), blocks_to_swap_in=(), blocks_to_copy=())
        )
        self.compute.add(lambda: self._done.update({id(step): CheckingDevice.run(self, step)}))
        for _ in range(self._random.randrange(4)):
            self._run_some()
        return step

    def run(self, step: CheckingStep) -> SamplerOutput:
        while id(step) not in self._done:
            assert self._run_some(), "the streams wait for each other"
        return self._done.pop(id(step))

    def _run_some(self) -> bool:
        ready = [stream for stream in (self.swap, self.compute) if stream.can_run]
        if not ready:
            return False
        self._random.choice(ready).run_one()
        return True


def run(seed: int, swaps: type[SwapStream]) -> tuple[LLMEngine, StreamedDevice]:
    """Samples that share blocks, in a pool that is too small, with aborts; checks every token."""
    config = EngineConfig(
        block_size=4, num_blocks=16, num_swap_blocks=40, preemption="swap", max_num_batched_tokens=24,
        enable_prefix_caching=seed % 2 == 0,
    )  # fmt: skip
    cache = CacheConfig(4, 16, config.prefix_caching, 40)
    device = StreamedDevice(cache, config, seed, swaps)
    engine = LLMEngine(device, MODEL, config, cache)
    params = SamplingParams(n=2, max_tokens=14, ignore_eos=True)
    prompts = {f"r{index}": [index] * (6 + seed % 5 + index) for index in range(6)}
    for request_id, prompt in prompts.items():
        engine.add_request(EngineRequest(request_id, prompt, params))
    tokens: dict[tuple[str, int], list[int]] = {}
    for _ in range(9):
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    engine.abort(f"r{seed % 6}")
    for key, rest in run_to_end(engine).items():
        tokens.setdefault(key, []).extend(rest)
    for (request_id, index), drawn in tokens.items():
        if request_id != f"r{seed % 6}":
            assert drawn == expected_tokens(prompts[request_id], params, index)
    return engine, device


def test_tokens_are_right_in_any_order_of_the_streams() -> None:
    num_swaps = num_overlaps = 0
    for seed in range(40):
        engine, device = run(seed, SwapStream)
        num_swaps += engine.stats().num_swaps
        num_overlaps += device.num_overlaps
    assert num_swaps > 40, "the pool was meant to be too small"
    assert num_overlaps > 10, "swaps were meant to run beside the step before"


class WithoutItsEnd(SwapStream):
    """The step does not wait for its swaps."""

    def begin_step(self, *arguments: Any) -> None:
        compute = self._compute()
        compute.wait_event = lambda *_: None  # type: ignore[method-assign]
        super().begin_step(*arguments)


def run_all(swaps: type[SwapStream]) -> None:
    for seed in range(40):
        run(seed, swaps)


def test_a_step_that_does_not_wait_for_its_swaps_is_wrong() -> None:
    with pytest.raises(AssertionError):
        run_all(WithoutItsEnd)


class Blocks:
    """A pool of names, and a host that swaps in one."""

    def __init__(self) -> None:
        self.names = {0: "shared", 1: "old"}
        self.swap, self.compute = FakeStream(), FakeStream()

    def move(self, copies: Sequence[BlockCopy], _to_host: bool) -> None:
        self.swap.add(lambda: self.names.update({copies[0].destination: "swapped in"}))

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        self.compute.add(lambda: self.names.update({copies[0].destination: self.names[copies[0].source]}))


def test_what_comes_in_waits_for_the_copies_of_the_step_before() -> None:
    """A block given up as the source of a copy-on-write is free, and is read by the step in flight nevertheless."""
    for seed in range(20):
        order, blocks = random.Random(seed), Blocks()
        streams = SwapStream(blocks.swap, lambda blocks=blocks: blocks.compute, contextlib.nullcontext, blocks.move)  # type: ignore[misc]
        streams.begin_step((), (), [BlockCopy(0, 1)], blocks.copy)
        streams.begin_step((), [BlockCopy(5, 0)], (), blocks.copy)
        while ready := [stream for stream in (blocks.swap, blocks.compute) if stream.can_run]:
            order.choice(ready).run_one()
        assert blocks.names == {0: "swapped in", 1: "shared"}
