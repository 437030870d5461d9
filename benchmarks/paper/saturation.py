"""What a system serves when requests always wait: the rate that no longer trace can exceed.

Under overload the batch depends on memory and lengths alone, not on how long steps last. So the work of each step is
recorded once, and priced afterwards under any step costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.paper.replay import PromptMaker
from benchmarks.paper.runs import Workload
from benchmarks.paper.setups import Setup, System, build_engine
from benchmarks.paper.traces import TraceRequest
from engine.execution.hardware import Hardware, find_hardware
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.request import EngineRequest

# By the most requests that ran at once: how many have finished when the batch, at first all of one age, has mixed, and
# how many more are measured.
_WARM_UP = 1.5
_MEASURED = 2.5
_FEWEST = 150
_QUEUE = 64
_MOST = 20_000


class Overload(NamedTuple):
    """A system that always has requests waiting."""

    setup: Setup
    system: System
    workload: Workload
    seed: int = 0


class Saturation(NamedTuple):
    """The steps of an overloaded system after its warm-up, and what a request generates."""

    overload: Overload
    works: Sequence[StepWork]
    tokens_per_request: float

    @property
    def num_batched(self) -> float:
        """Requests in a step, on average."""
        return sum(work.num_seqs for work in self.works) / len(self.works) / self.overload.workload.num_sequences

    def rate(self, hardware: Hardware) -> float:
        """Requests a second that it serves on this hardware."""
        model = self._model(hardware)
        num_tokens = sum(work.num_samples for work in self.works)
        return num_tokens / sum(map(model.seconds, self.works)) / self.tokens_per_request

    def arithmetic_share(self, hardware: Hardware) -> float:
        """How much of its matrix products' time arithmetic would take without waiting for the weights: 1 if bound."""
        model = self._model(hardware)
        weights_s = model.weight_bytes / hardware.memory_bandwidth
        seconds = [model.matrix_flops(work) / hardware.matrix_flops for work in self.works]
        return float(np.mean(np.minimum(np.array(seconds) / weights_s, 1.0)))

    def step_s(self, hardware: Hardware) -> float:
        """Seconds that a step lasts, on average."""
        return float(np.mean([*map(self._model(hardware).seconds, self.works)]))

    def parts(self, hardware: Hardware) -> dict[str, float]:
        """Seconds of an average step by what takes them, each at its own bound."""
        model, count = self._model(hardware), len(self.works)
        num_seqs = sum(work.num_seqs for work in self.works) / count
        all_reduces = 2 * model.model.num_layers if hardware.num_devices > 1 else 0
        parts = {
            "host's step": hardware.step_s,
            "host's sequences": hardware.sequence_s * num_seqs,
            "all-reduces' latency": hardware.all_reduce_s * all_reduces,
            "KV reads": sum(map(model.kv_bytes, self.works)) / count / hardware.kv_bandwidth / hardware.num_devices,
        }
        return {**parts, "matrix products and the rest": self.step_s(hardware) - sum(parts.values())}

    def _model(self, hardware: Hardware) -> StepTimeModel:
        return StepTimeModel(self.overload.setup.model_config(), hardware, block_size=16)


def saturate(overload: Overload) -> Saturation:
    """Admit requests as memory allows, and record the steps between the warm-up and the last that counts."""
    setup, workload = overload.setup, overload.workload
    engine, executor = build_engine(setup, overload.system)
    requests = _requests(overload)
    prompts = PromptMaker(engine.model_config.vocab_size, overload.seed)
    works: list[StepWork] = []
    added = finished = most_running = 0
    while finished < _WARM_UP * most_running + max(_FEWEST, _MEASURED * most_running):
        stats = engine.stats()
        most_running = max(most_running, stats.num_running)
        # A short queue that never empties is as good as all requests at once, and cheaper to count.
        for _ in range(stats.num_waiting, _QUEUE):
            request = requests[added]
            engine.add_request(EngineRequest(str(added), prompts.make(request), workload.sampling(request)))
            added += 1
        finished += sum(output.request_finished for output in engine.step())
        if finished >= _WARM_UP * most_running:
            works.append(executor.last_work)
    mean = float(np.mean([request.num_output_tokens for request in requests]))
    return Saturation(overload, works, mean * workload.num_sequences)


def saturated_rate(overload: Overload) -> float:
    """Requests a second on the setup's own hardware."""
    return saturate(overload).rate(find_hardware(overload.setup.hardware))


def _requests(overload: Overload) -> list[TraceRequest]:
    num_shared = overload.workload.num_shared
    prompts, outputs = overload.workload.lengths.draw(_MOST, np.random.default_rng((overload.seed, 1)))
    pairs = zip(prompts.tolist(), outputs.tolist(), strict=True)
    return [TraceRequest(0.0, prompt + num_shared, output, num_shared) for prompt, output in pairs]
