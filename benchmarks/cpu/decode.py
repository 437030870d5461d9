"""Decode steps measured apart: a batch of sequences of about one length, all of them decoding."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.cpu.machine import MachineRates, mean_of
from benchmarks.cpu.roofline import Sizes, floor_seconds
from benchmarks.cpu.steps import Probe, Step
from engine.engine import LLMEngine
from engine.model_config import ModelConfig
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

_PARTS = 4  # of a case, between which the machine is looked at


class DecodeCase(NamedTuple):
    """Steps of `batch` sequences whose contexts grow by `num_steps` around `context` tokens."""

    batch: int
    context: int
    num_steps: int


class DecodeResult(NamedTuple):
    """Medians over a case's steps, in seconds; `floor` is the roofline's, by phase, or empty without one. `machine` is
    what the machine sustained before the steps, between each few of them, and after."""

    case: DecodeCase
    step_s: float
    phases: dict[str, float]
    python_share: float
    floor: dict[str, float]
    machine: list[MachineRates]

    @property
    def floor_ratio(self) -> float | None:
        """How many times the roofline a step takes."""
        return self.step_s / sum(self.floor.values()) if self.floor else None


def measure_decode(engine: LLMEngine, case: DecodeCase, measure: Callable[[], MachineRates] | None) -> DecodeResult:
    """The engine must be idle; it is again when this returns. `measure` reads the machine's rates."""
    probe = Probe(engine)
    machine: list[MachineRates] = []
    steps = decode_steps(engine, probe, case, None if measure is None else lambda: machine.append(measure()))
    floor = {}
    if measure is not None:
        sizes = Sizes(probe.weight_bytes(), probe.kv_bytes_per_token())
        floor = _per_step(engine.model_config, sizes, steps, mean_of(machine))
    return DecodeResult(
        case,
        statistics.median(step.seconds for step in steps),
        {name: statistics.median(step.phases[name] for step in steps) for name in steps[0].phases},
        statistics.median(step.python_share for step in steps),
        floor,
        machine,
    )


def decode_steps(
    engine: LLMEngine, probe: Probe, case: DecodeCase, between: Callable[[], None] | None = None
) -> list[Step]:
    """The case's steps, once every prompt is computed. `between` is called before them, a few times on the way and
    after; the step that follows it is not counted, for it finds none of the weights in the caches."""
    rng = np.random.default_rng(0)
    # While the last prompts are computed the first sequences already decode, which takes a step a budget of prompts.
    head_start = case.batch * case.context // engine.config.max_num_batched_tokens
    num_steps = case.num_steps + min(_PARTS, case.num_steps)
    num_prompt = max(1, case.context - (head_start + num_steps) // 2)
    params = SamplingParams(max_tokens=head_start + 2 * num_steps + 8, temperature=0.0, ignore_eos=True)
    vocab_size = engine.model_config.vocab_size
    for index in range(case.batch):
        engine.add_request(EngineRequest(f"decode-{index}", rng.integers(0, vocab_size, num_prompt).tolist(), params))
    decoding: list[Step] = []
    between = between or (lambda: None)
    with probe.recording() as steps:
        cold = True
        while len(decoding) < case.num_steps:
            if not engine.has_unfinished_requests:
                raise ValueError(f"{case.batch} sequences of {case.context} tokens never decoded all together")
            engine.step()
            if not steps or not _all_decode(steps[-1], case.batch):
                continue
            if cold:
                between()
            else:
                decoding.append(steps[-1])
            cold = not cold and len(decoding) % -(-case.num_steps // _PARTS) == 0
    between()
    engine.abort_all("abort")
    return decoding


def _all_decode(step: Step, batch: int) -> bool:
    return len(step.output.scheduled) == batch == step.output.num_tokens


def _per_step(model: ModelConfig, sizes: Sizes, steps: Sequence[Step], machine: MachineRates) -> dict[str, float]:
    total = floor_seconds(model, sizes, [step.output for step in steps], machine)
    return {name: seconds / len(steps) for name, seconds in total.items()}
