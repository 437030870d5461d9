"""A simulated device: steps last what a step-time model says, tokens are a function of the sequence.

The scheduler, the allocator and the block tables above it are the engine's own, so that memory, batching and
preemption at any scale can be studied, and fleets of replicas tested, on a machine without the hardware. Whoever shows
a result from it says that it is simulated, and on what: `Hardware.name` and `Hardware.source` are there for that.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine.config import CacheConfig, EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution.executor import AsyncExecutor
from engine.execution.hardware import Hardware
from engine.execution.latest_tokens import LatestTokens
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.execution.simulated_tokens import SimulatedLanguage
from engine.int32_buffer import Int32Array
from engine.model_config import ModelConfig
from engine.preemption import SwapCost
from engine.scheduling import SampleRequest, SamplerOutput, SchedulerOutput

if TYPE_CHECKING:
    from engine.tokenization import Tokenizer

# A step that begins within this after the one before follows it; later, the engine had nothing to do.
MAX_HOST_S = 0.005


class Clock(Protocol):
    """Where simulated time passes."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def advance(self, seconds: float) -> None:
        """Let this much time pass."""
        ...


class VirtualClock:
    """A number that only `advance` changes: hours of a simulated device pass in minutes."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0.0, "time runs backwards"
        self._now += seconds


class RealClock:
    """Sleeps: for fleets, whose other parts live in real time."""

    def now(self) -> float:
        return time.monotonic()

    def advance(self, seconds: float) -> None:
        time.sleep(seconds)


class SimulatedStep(NamedTuple):
    """A submitted step: when the device ends it, and what it draws."""

    clock: Clock
    ends_at: float
    drawn: SamplerOutput

    def result(self) -> SamplerOutput:
        self.clock.advance(max(0.0, self.ends_at - self.clock.now()))
        return self.drawn


class SimulatedExecutor(AsyncExecutor):
    """An Executor that computes nothing: it prices each step, lets the time pass, and makes up the tokens.

    Attributes:
        last_work: what the latest step did, for whoever measures batches.
        last_tables: the block tables that it used, of all its sequences, for whoever measures what they share. Valid
            until the next step is scheduled.
        busy_s: seconds that all steps together lasted; with asynchronous scheduling, their device's share of it.
    """

    def __init__(
        self, model: ModelConfig, hardware: Hardware, block_size: int, clock: Clock, language: SimulatedLanguage
    ) -> None:
        self.clock = clock
        self.step_time = StepTimeModel(model, hardware, block_size)
        self.last_work = StepWork(0, 0, 0, 0, 0)
        self.last_tables: list[Int32Array] = []
        self.busy_s = 0.0
        self._language = language
        self._device_free_at = -math.inf
        self._latest = LatestTokens()

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        requests = self._begin(output)
        seconds = self.step_time.seconds(self.last_work)
        self.busy_s += seconds
        # Where time is real, what this process does between two steps and in them is part of them, not on top: the
        # model's price of a step has the host's work in it.
        now = self.clock.now()
        follows = 0.0 <= now - self._device_free_at <= MAX_HOST_S
        self._device_free_at = (self._device_free_at if follows else now) + seconds
        drawn = self._language.sample(requests)
        self.clock.advance(max(0.0, self._device_free_at - self.clock.now()))
        return drawn

    def _begin(self, output: SchedulerOutput) -> list[SampleRequest]:
        self.last_work = StepWork.of(output)
        self.last_tables = [item.block_table for item in output.scheduled]
        return [request for item in output.scheduled for request in item.samples]

    @property
    def overlaps(self) -> bool:
        """False, so that steps follow one another as on the paper's system unless `async_scheduling` is asked for."""
        return False

    def submit(self, output: SchedulerOutput) -> SimulatedStep:
        """The host takes its share of the step's time now, the device its own once it is done with the step before."""
        requests = self._begin(self._latest.fill(output))
        host_s = self.step_time.host_seconds(self.last_work)
        device_s = self.step_time.seconds(self.last_work) - host_s
        self.clock.advance(host_s)
        self._device_free_at = max(self.clock.now(), self._device_free_at) + device_s
        self.busy_s += device_s
        drawn = self._language.sample(requests)
        self._latest.remember(drawn)
        return SimulatedStep(self.clock, self._device_free_at, drawn)

    def swap_cost(self) -> SwapCost:
        """What `auto` preemption weighs against recomputation: the model's own price of moving a block."""
        block_bytes = self.step_time.block_bytes
        rate = block_bytes / self.step_time.moved_block_s
        return SwapCost(block_bytes, rate, rate)


def build_simulated_engine(
    model: ModelConfig,
    hardware: Hardware,
    config: EngineConfig,
    clock: Clock,
    language: SimulatedLanguage | None = None,
    *,
    model_id: str = "simulated",
    tokenizer: Tokenizer | None = None,
) -> tuple[LLMEngine, SimulatedExecutor]:
    """The real engine over a simulated device. Needs no weights and no torch.

    Without `config.num_blocks` the pool is what `gpu_memory_utilization` (0.9 unless set) of the hardware's memory
    leaves beside the weights.

    Raises:
        ConfigError: the weights leave no room for the KV pool, or the options contradict the model.
    """
    language = language or SimulatedLanguage(model.vocab_size, model.eos_token_ids)
    executor = SimulatedExecutor(model, hardware, config.block_size, clock, language)
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = executor.step_time.num_affordable_blocks(config.gpu_memory_utilization or 0.9)
        if num_blocks < 1:
            raise ConfigError(
                f"simulated {hardware.name}: {executor.step_time.weight_bytes / 1e9:.1f} GB of weights leave no room "
                f"for the KV cache in {hardware.num_devices} x {hardware.memory_bytes / 1e9:.0f} GB"
            )
    cache = CacheConfig.of(config, num_blocks)
    engine = LLMEngine(executor, model, config, cache, model_id=model_id, tokenizer=tokenizer, clock=clock.now)
    engine.pin_shared_prefixes()
    return engine, executor
