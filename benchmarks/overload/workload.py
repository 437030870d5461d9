"""What comes: phases of so many times the fleet's capacity, by one tenant, or by one that floods beside a calm one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Phase(NamedTuple):
    """So many seconds of requests that ask for `load` times what the fleet can do, of which the calm tenant's ask for
    `calm_load`."""

    name: str
    seconds: float
    load: float
    calm_load: float = 0.0


class Lengths(NamedTuple):
    """Tokens of a request, drawn evenly."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    @property
    def mean_prompt(self) -> float:
        return sum(self.prompt) / 2

    @property
    def mean_output(self) -> float:
        return sum(self.output) / 2


class Coming(NamedTuple):
    """A request and when it first comes, in seconds from the start. `prefix` makes its prompt unlike all others."""

    number: int
    due_s: float
    phase: str
    tenant: str
    prompt_tokens: int
    output_tokens: int


FLOODING, CALM = "flooding", "calm"


def arrivals(phases: Sequence[Phase], lengths: Lengths, capacity: float, seed: int) -> list[Coming]:
    """Requests of all phases in order: Poisson arrivals of each tenant.

    Args:
        capacity: requests a second that the fleet can serve.
    """
    draw = random.Random(seed)
    found: list[tuple[float, str, str]] = []
    began_s = 0.0
    for phase in phases:
        for tenant, load in ((FLOODING, phase.load - phase.calm_load), (CALM, phase.calm_load)):
            at_s = began_s
            while load > 0 and (at_s := at_s + draw.expovariate(load * capacity)) < began_s + phase.seconds:
                found.append((at_s, phase.name, tenant))
        began_s += phase.seconds
    found.sort()
    return [
        Coming(number, at_s, phase, tenant, draw.randint(*lengths.prompt), draw.randint(*lengths.output))
        for number, (at_s, phase, tenant) in enumerate(found)
    ]


def jitter_s(draw: random.Random, retry_after_s: int) -> float:
    """What a client adds to the time that it was told, so that not all come at once."""
    return draw.uniform(0.0, 1.0 + 0.1 * retry_after_s)
