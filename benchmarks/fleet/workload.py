"""A piece of a Mooncake trace, scaled so that real Serve applications on a small machine can replay it.

With `scale` lengths, blocks and prices shrink together and with `speed` the clock runs faster, so that every time of
the replay times `speed` is a time of the trace, and the replay asks of its replicas what the trace asks of theirs.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.cpu.requests import Request
from benchmarks.routing.trace import BLOCK_SIZE, Arrival
from benchmarks.serving.workload import prompt_of_blocks
from engine.errors import ConfigError


class FleetShape(NamedTuple):
    """The fleet in the trace's units, as benchmarks.routing has it, and how the replay scales them.

    Attributes:
        num_blocks: KV blocks of 512 tokens a replica.
        prefill_tokens_per_s: of a replica.
        scale: of lengths.
        speed: of the clock.
        step_s: seconds of a step that only decodes, in the replay's own time.
    """

    num_replicas: int
    num_ingresses: int
    num_blocks: int
    prefill_tokens_per_s: float
    scale: float
    speed: float
    step_s: float

    @property
    def block_size(self) -> int:
        """Tokens of one of the trace's blocks in the replay. ConfigError if the engine has no such blocks."""
        size = BLOCK_SIZE * self.scale
        if size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            raise ConfigError(f"scale={self.scale:g} gives blocks of {size:g} tokens, not a power of two up to 256")
        return int(size)

    @property
    def replica_tokens_per_s(self) -> float:
        """Prompt tokens a second of a replica in the replay."""
        return self.prefill_tokens_per_s * self.scale * self.speed

    @property
    def step_tokens(self) -> int:
        """Token budget of a step: prompts come in chunks of about one and a half decode steps' time."""
        return max(16, round(1.5 * self.step_s * self.replica_tokens_per_s))


def scaled_request(arrival: Arrival, shape: FleetShape) -> Request:
    """The request as it is sent: token ids that are a function of the trace's block ids."""
    traced = arrival.request
    num_output = max(1, round(traced.output_length * shape.scale))
    num_prompt = max(1, round(traced.input_length * shape.scale))
    return Request(prompt_of_blocks(arrival.chain, num_prompt, shape.block_size), num_output)


def due_times(arrivals: list[Arrival], speed: float) -> list[float]:
    """Seconds of the replay, the first request at 0."""
    return [(arrival.time_s - arrivals[0].time_s) / speed for arrival in arrivals]
