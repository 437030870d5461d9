"""How much traffic replicas can bear, and how many of them a traffic needs: the capacity formula of docs/operations.md.

A replica computes in steps: each draws a token for every running sequence, and computes what prompts wait. From what
steps take follows how long a token takes, by Little's law how many sequences run, and how long a prompt waits. Prompts
queue for the replicas, sequences for seats and blocks, as in M/G/c (Allen and Cunneen). Means go in; where the text
says p95, queues are taken to be as long as they are in one of twenty cases.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from app.autoscaling.sizing import late_wait_s
from engine.errors import ConfigError

_LATE_SHARE = 0.05
_MAX_REPLICAS = 4096
# Sequences that run, found by iteration to within this.
_PRECISION = 1e-6
_MAX_ITERATIONS = 10_000
# Where prompts and decodes overlap, steps are told apart by what they compute of prompts, in so many parts at most.
_MAX_PARTS = 128
# What is less likely than this is left out.
_UNLIKELY = 1e-12


class Pace(NamedTuple):
    """What steps of one replica take, as measured: `python -m benchmarks.capacity` does so.

    Attributes:
        prompt_tokens_per_s: as fast as prompts are computed; where steps overlap, all tokens.
        step_s: a step of one sequence more, less `sequence_s`: what it takes whatever it computes.
        sequence_s: what each running sequence adds.
        overlaps: a step lasts as long as its decodes do alone, or as computing all of its tokens if that is longer, as
            on a GPU whose decodes wait for memory while prompts compute; otherwise both add up, as on a CPU.
    """

    prompt_tokens_per_s: float
    step_s: float
    sequence_s: float = 0.0
    overlaps: bool = False

    def decode_s(self, num_running: float) -> float:
        """A step that only decodes."""
        return self.step_s + self.sequence_s * num_running

    def mixed_s(self, num_tokens: float, num_running: float) -> float:
        """A step that computes prompt tokens as well."""
        decode_s = self.decode_s(num_running)
        if self.overlaps:
            return max(decode_s, (num_tokens + num_running) / self.prompt_tokens_per_s)
        return decode_s + num_tokens / self.prompt_tokens_per_s

    def prompt_s(self, num_tokens: float, num_running: float) -> float:
        """What prompt tokens add to a step."""
        return self.mixed_s(num_tokens, num_running) - self.decode_s(num_running)


class Traffic(NamedTuple):
    """What is asked for.

    Attributes:
        prompt_tokens: of a mean request, those that are in no cache.
        held_prompt_tokens: of a mean request, those that it holds blocks for; shared prefixes are held once, for all.
        prompt_variation, output_variation: variance of the lengths over the square of their mean; 1 is an
            exponential's, 0 of requests that are all of one length.
    """

    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    held_prompt_tokens: float | None = None
    prompt_variation: float = 1.0
    output_variation: float = 1.0


class ReplicaLimits(NamedTuple):
    """What a replica has room for: engine options, and `num_blocks` as the engine logs it."""

    max_num_seqs: int
    num_blocks: int
    block_size: int = 16
    max_num_batched_tokens: int = 2048

    def seats(self, traffic: Traffic) -> float:
        """Requests that it can run at a time: each holds on average its prompt and half of its output."""
        held = traffic.prompt_tokens if traffic.held_prompt_tokens is None else traffic.held_prompt_tokens
        blocks = math.ceil((held + traffic.output_tokens / 2) / self.block_size)
        return min(self.max_num_seqs, self.num_blocks / max(1, blocks))


class Foreseen(NamedTuple):
    """What a traffic brings.

    Attributes:
        ttft_p95_s: infinite where the replicas cannot keep up.
        tpot_s: seconds a token.
        running: sequences that run on each replica.
        seat_share: the part of its seats, of blocks or `max_num_seqs`, that they take.
        prompt_share: the part of its time that prompts add to the steps of a replica.
    """

    ttft_p95_s: float
    tpot_s: float
    running: float
    seat_share: float
    prompt_share: float


_OVERLOADED = Foreseen(math.inf, math.inf, math.inf, math.inf, 1.0)


def foresee(pace: Pace, limits: ReplicaLimits, traffic: Traffic, num_replicas: int) -> Foreseen:
    """What so many replicas make of a traffic."""
    _check(pace, limits, traffic)
    rate = traffic.requests_per_s / num_replicas
    seats = limits.seats(traffic)
    steady = _overlapping(pace, limits, traffic, rate, seats) if pace.overlaps else _adding(pace, traffic, rate, seats)
    if steady is None:
        return _OVERLOADED
    running, tpot_s = steady
    decode_s, own_s = pace.decode_s(running), pace.prompt_s(traffic.prompt_tokens, running)
    # Whoever waits is computed in steps that are full of prompts.
    room = limits.max_num_batched_tokens - running
    if room <= 0:
        return _OVERLOADED
    service_s = traffic.prompt_tokens * pace.mixed_s(room, running) / room
    prompts_s = late_wait_s(num_replicas, num_replicas * rate * service_s, service_s, _LATE_SHARE)
    seats_s = late_wait_s(
        max(1, int(num_replicas * seats)), num_replicas * running, traffic.output_tokens * tpot_s, _LATE_SHARE
    )
    # The step that runs when it comes, and its own; prompts longer than a step take several.
    steps = max(1.0, traffic.prompt_tokens / room)
    first_s = decode_s + own_s + steps * decode_s + own_s
    prompts_s *= (1.0 + traffic.prompt_variation) / 2
    seats_s *= (1.0 + traffic.output_variation) / 2
    ttft_s = prompts_s + seats_s + first_s
    return Foreseen(ttft_s, tpot_s, running, running / seats, 1.0 - decode_s / tpot_s)


def capacity(pace: Pace, limits: ReplicaLimits, traffic: Traffic, num_replicas: int, ttft_target_s: float) -> float:
    """Requests a second at which the first token of 95 in 100 requests still comes within the target; 0 if the target
    cannot be met at all. `traffic.requests_per_s` does not matter."""
    low, high = 0.0, 1.0

    def bears(rate: float) -> bool:
        found = foresee(pace, limits, traffic._replace(requests_per_s=rate), num_replicas)
        return found.ttft_p95_s <= ttft_target_s

    if not bears(_PRECISION):
        return 0.0
    while bears(high):
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low


def replicas_for(
    pace: Pace, limits: ReplicaLimits, traffic: Traffic, ttft_target_s: float, max_seat_share: float = 0.75
) -> int:
    """The fewest replicas with which the target is kept and no pool runs fuller than `max_seat_share`.

    Raises:
        ConfigError: no number does: the target is shorter than a prompt takes alone.
    """
    if capacity(pace, limits, traffic, 1, ttft_target_s) == 0.0:
        alone = foresee(pace, limits, traffic._replace(requests_per_s=_PRECISION), 1)
        raise ConfigError(
            f"ttft_target_s={ttft_target_s:g} cannot be kept: a prompt of {traffic.prompt_tokens:g} tokens takes "
            f"{alone.ttft_p95_s:.3g} s on an idle replica"
        )
    for number in range(1, _MAX_REPLICAS + 1):
        found = foresee(pace, limits, traffic, number)
        if found.ttft_p95_s <= ttft_target_s and found.seat_share <= max_seat_share:
            return number
    raise ConfigError(f"requests_per_s={traffic.requests_per_s:g} needs more than {_MAX_REPLICAS} replicas")


class _Steady(NamedTuple):
    """Sequences that run at a time, by Little's law, and a mean step: each draws a token in it."""

    running: float
    step_s: float


def _adding(pace: Pace, traffic: Traffic, rate: float, seats: float) -> _Steady | None:
    """The least number of sequences whose pace keeps it, where prompts and decodes add up. None if it exceeds the
    seats."""
    share = rate * traffic.prompt_tokens / pace.prompt_tokens_per_s
    if share >= 1.0:
        return None
    running = 0.0
    for _ in range(_MAX_ITERATIONS):
        step_s = pace.decode_s(running) / (1.0 - share)
        found = rate * traffic.output_tokens * step_s
        if found >= seats:
            return None
        if abs(found - running) < _PRECISION * max(1.0, running):
            return _Steady(found, step_s)
        running = found
    return None


def _overlapping(pace: Pace, limits: ReplicaLimits, traffic: Traffic, rate: float, seats: float) -> _Steady | None:
    """The same where a step is as long as the longer of both.

    Then a long step costs prompts more than a short one: what comes while it lasts is computed in the next, together,
    and hides behind one step's decodes only. So it goes by the distribution of steps, a Markov chain: each computes the
    prompts, a Poisson number, that came during the one before it.
    """
    budget = limits.max_num_batched_tokens
    if rate * (traffic.prompt_tokens + traffic.output_tokens) >= pace.prompt_tokens_per_s:
        return None
    part = min(max(traffic.prompt_tokens, budget / _MAX_PARTS), float(budget))
    parts_per_s = rate * traffic.prompt_tokens / part
    most = math.ceil(budget / part)
    shares = [1.0] + [0.0] * most
    running = 0.0
    for _ in range(_MAX_ITERATIONS):
        steps_s = [pace.mixed_s(min(number * part, max(0.0, budget - running)), running) for number in range(most + 1)]
        step_s = sum(share * lasts_s for share, lasts_s in zip(shares, steps_s, strict=True))
        found = rate * traffic.output_tokens * step_s
        if found >= seats:
            return None
        if abs(found - running) < _PRECISION * max(1.0, running):
            return _Steady(found, step_s)
        running = found
        following = [0.0] * (most + 1)
        for share, lasts_s in zip(shares, steps_s, strict=True):
            if share < _UNLIKELY:
                continue
            expected = parts_per_s * lasts_s
            probability = share * math.exp(-expected)
            for number in range(most):
                following[number] += probability
                probability *= expected / (number + 1)
                if number > expected and probability < _UNLIKELY:
                    break
        following[most] = max(0.0, 1.0 - sum(following))
        shares = following
    return None


def _check(pace: Pace, limits: ReplicaLimits, traffic: Traffic) -> None:
    if not (0.0 < pace.prompt_tokens_per_s < math.inf and 0.0 < pace.step_s < math.inf and pace.sequence_s >= 0.0):
        raise ConfigError(f"{pace} must have prompt_tokens_per_s and step_s above 0, and sequence_s of 0 or more")
    if not (traffic.requests_per_s > 0.0 and traffic.prompt_tokens > 0.0 and traffic.output_tokens >= 1.0):
        raise ConfigError(f"{traffic} must have requests_per_s and prompt_tokens above 0, output_tokens of 1 or more")
    if not min(traffic.prompt_variation, traffic.output_variation) >= 0.0:
        raise ConfigError(f"{traffic} must have prompt_variation and output_variation of 0 or more")
    if limits.seats(traffic) < 1.0:
        raise ConfigError(f"num_blocks={limits.num_blocks} of {limits.block_size} tokens do not hold one such request")
    if min(limits.max_num_seqs, limits.max_num_batched_tokens, limits.block_size) < 1:
        raise ConfigError(f"{limits} must have numbers of 1 or more")
