"""A replica's load, and the rates that it measures on itself."""

from __future__ import annotations

import math

from app.transport.messages import LoadReport
from engine.outputs import EngineStats

# Weight of a new sample in the moving averages.
_WEIGHT = 0.1
# Fewer prompt tokens than this in a step say little about the prefill rate.
_MIN_PREFILL_TOKENS = 16
# Of the prompt tokens that capacity is judged by, those before so many others count for little.
_CAPACITY_TOKENS = 20_000
# A step without prompt counts as so much of those with, in the line that tells how long a full step would last.
_EMPTY_STEPS = 0.1
# One more prompt token is taken to cost at least so much of what each has cost on average.
_LEAST_SLOPE = 0.25
# Batches must differ by about this (squared) before a line through them means anything.
_MIN_BATCH_VARIANCE = 0.5


class RateMeter:
    """Estimates the prefill rate, and the time of a decode step by its size, from snapshots of a busy engine.

    Tokens computed between two snapshots are those by which the running sequences grew; what is left after the tokens
    they drew and those found in the prefix cache is prompt. Intervals in which sequences ended, were preempted, or the
    engine idled say nothing and are passed over. What one more sequence adds to a step is the slope of a line through
    steps of different sizes, in moving averages; unknown while all are of one size.

    The prefill rate is for foreseeing when a prompt will be computed, so decodes in the same steps count as time that
    it takes: where they cost a step nothing but a part of its token budget, nothing else shows what they take.
    """

    def __init__(self) -> None:
        # Of steps with prompt: tokens squared, and tokens times seconds.
        self._squared_tokens = _Moment()
        self._token_s = _Moment()
        self._batch = _Moment()
        self._step_s = _Moment()
        self._batch_squared = _Moment()
        self._batch_step_s = _Moment()
        self._step_s_squared = _Moment()
        self._prefill_scatter = _Moment()
        self._prompt_steps = _PromptSteps()
        self._last: EngineStats | None = None
        self._last_time_s = 0.0

    def observe(self, stats: EngineStats, now_s: float) -> None:
        """Take the snapshot after a step; `now_s` is a monotonic clock's."""
        last, elapsed_s = self._last, now_s - self._last_time_s
        self._last, self._last_time_s = stats, now_s
        if last is None or not (last.num_running or last.num_waiting):
            return
        steps = stats.num_steps - last.num_steps
        grown = stats.num_running_tokens - last.num_running_tokens
        drawn = stats.num_output_tokens - last.num_output_tokens
        shrunk = stats.num_preemptions != last.num_preemptions or stats.num_running < last.num_running
        if steps <= 0 or elapsed_s <= 0 or shrunk or grown < 0:
            return
        prompt = grown - drawn - (stats.num_cached_tokens - last.num_cached_tokens)
        if prompt >= _MIN_PREFILL_TOKENS:
            squared_tokens, token_s = prompt * prompt / steps, prompt * elapsed_s / steps
            self._squared_tokens.add(squared_tokens)
            self._token_s.add(token_s)
            self._prefill_scatter.add((squared_tokens - self.prefill_tokens_per_s * token_s) ** 2)
            self._prompt_steps.add(prompt / steps, elapsed_s / steps, drawn / steps)
        elif drawn and stats.num_running == last.num_running and prompt <= 0:
            self._observe_decode(drawn / steps, elapsed_s / steps)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second in steps that compute prompts, each counted by its prompt tokens; 0 until known."""
        return self._squared_tokens.mean / self._token_s.mean if self._token_s.mean else 0.0

    @property
    def prefill_error(self) -> float:
        """Standard error of `prefill_tokens_per_s`, a ratio of means; all of it while too few samples tell."""
        samples = self._token_s.num_samples
        if samples <= 1:
            return self.prefill_tokens_per_s
        return math.sqrt(self._prefill_scatter.mean / (samples - 1)) / self._token_s.mean

    def prompt_capacity(self, step_tokens: int) -> float:
        """Prompt tokens a second of steps of `step_tokens` that are full of them, beside decodes as they were; 0 until
        known.

        Unlike `prefill_tokens_per_s`, which is of steps as they were, however full.
        """
        num_prompt = step_tokens - self._prompt_steps.num_decodes
        if not self._prompt_steps or num_prompt < 1.0:
            return 0.0
        return num_prompt / self._prompt_steps.seconds(num_prompt, self._step_s.mean)

    @property
    def decode_step_s(self) -> float:
        """Seconds of a step that only decodes; 0 until known."""
        return self._step_s.mean

    @property
    def decode_sequence_s(self) -> float:
        """Seconds that one more sequence adds to a step; 0 until known."""
        variance = self._batch_squared.mean - self._batch.mean**2
        if variance < _MIN_BATCH_VARIANCE:
            return 0.0
        slope = (self._batch_step_s.mean - self._batch.mean * self._step_s.mean) / variance
        # Noise must not make sequences free: each takes at least a tenth of its share of the step, and at most all.
        share_s = self._step_s.mean / self._batch.mean
        return min(max(slope, share_s / 10), share_s)

    @property
    def decode_sequence_error_s(self) -> float:
        """Standard error of `decode_sequence_s`, the slope of a line: from what the line leaves unexplained."""
        slope, samples = self.decode_sequence_s, self._batch.num_samples
        if not slope or samples <= 2:
            return slope
        variance = self._batch_squared.mean - self._batch.mean**2
        scatter = self._step_s_squared.mean - self._step_s.mean**2 - slope**2 * variance
        return math.sqrt(max(scatter, 0.0) / (variance * (samples - 2)))

    def _observe_decode(self, batch: float, step_s: float) -> None:
        self._batch.add(batch)
        self._step_s.add(step_s)
        self._batch_squared.add(batch * batch)
        self._batch_step_s.add(batch * step_s)
        self._step_s_squared.add(step_s * step_s)


class _PromptSteps:
    """How long steps last by the prompt tokens in them: averages in which a step counts by those.

    Whether what decodes and what prompts take add up, as on a CPU, or the longer of the two is how long a step lasts,
    as where decodes only wait for memory, shows in steps of different sizes alone: so it is a line through those, and
    through steps that only decode, that tells how long a fuller one lasts.
    """

    def __init__(self) -> None:
        # Sums, of weight and of its products with tokens, seconds, both squared or multiplied, and decodes.
        self._sums = [0.0] * 6

    def __bool__(self) -> bool:
        return self._sums[0] > 0.0

    def add(self, num_prompt: float, seconds: float, num_decodes: float) -> None:
        """A step of so many prompt tokens, and decodes beside them."""
        kept = math.exp(-num_prompt / _CAPACITY_TOKENS)
        values = (1.0, num_prompt, seconds, num_prompt * num_prompt, num_prompt * seconds, num_decodes)
        self._sums = [total * kept + num_prompt * value for total, value in zip(self._sums, values, strict=True)]

    @property
    def num_decodes(self) -> float:
        """Sequences that drew a token in them; 0 while there were none."""
        return self._sums[5] / self._sums[0] if self else 0.0

    def seconds(self, num_prompt: float, decode_step_s: float) -> float:
        """Of a step of so many prompt tokens, where one without any takes `decode_step_s`, 0 if that is not known."""
        tokens, mean_s, squares, products = (total / self._sums[0] for total in self._sums[1:5])
        variance, covariance = squares - tokens * tokens, products - tokens * mean_s
        if decode_step_s:
            variance += _EMPTY_STEPS * tokens * tokens
            covariance += _EMPTY_STEPS * tokens * (mean_s - decode_step_s)
        most = mean_s / tokens
        slope = covariance / variance if variance > 1e-6 * tokens * tokens else most
        return mean_s + (num_prompt - tokens) * min(max(slope, _LEAST_SLOPE * most), most)


class _Moment:
    """A moving average that begins at its first sample."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._squared_weights = 0.0

    def add(self, sample: float) -> None:
        weight = _WEIGHT if self._squared_weights else 1.0
        self.mean += (sample - self.mean) * weight
        self._squared_weights = self._squared_weights * (1.0 - weight) ** 2 + weight**2

    @property
    def num_samples(self) -> float:
        """It is as certain as the plain mean of so many."""
        return 1.0 / self._squared_weights if self._squared_weights else 0.0


def load_report(stats: EngineStats, meter: RateMeter, cache_age_s: float, admitted: tuple[int, ...]) -> LoadReport:
    """What an ingress is told; `admitted` are its attempts that `stats` now include."""
    return LoadReport(
        num_blocks=stats.num_blocks,
        num_free_blocks=stats.num_free_blocks,
        num_empty_blocks=stats.num_empty_blocks,
        cache_age_s=cache_age_s,
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        num_waiting_tokens=stats.num_waiting_tokens,
        num_running_tokens=stats.num_running_tokens,
        prefill_tokens_per_s=meter.prefill_tokens_per_s,
        decode_step_s=meter.decode_step_s,
        decode_sequence_s=meter.decode_sequence_s,
        prefill_error=meter.prefill_error,
        decode_sequence_error_s=meter.decode_sequence_error_s,
        admitted=admitted,
        adapters=stats.adapters.resident,
        num_free_adapter_slots=stats.adapters.num_free_slots,
        adapter_load_s=stats.adapters.load_s / max(stats.adapters.num_loads, 1),
    )
