"""A replica's load, and the rates that it measures on itself."""

from __future__ import annotations

from app.transport.messages import LoadReport
from engine.outputs import EngineStats

# Weight of a new sample in the moving averages.
_WEIGHT = 0.2
# Fewer prompt tokens than this in a step say little about the prefill rate.
_MIN_PREFILL_TOKENS = 16


class RateMeter:
    """Estimates the prefill rate and the time of a decode step from successive snapshots of a busy engine.

    Tokens computed between two snapshots are those by which the running sequences grew; what is left after the tokens
    they drew and those found in the prefix cache is prompt. Intervals in which sequences ended, were preempted, or the
    engine idled say nothing and are passed over.
    """

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.decode_batch = 0.0
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
            decode_s = self.decode_step_s * steps if drawn else 0.0
            rate = prompt / max(elapsed_s - decode_s, elapsed_s / 4)
            self.prefill_tokens_per_s = _average(self.prefill_tokens_per_s, rate)
        elif drawn and stats.num_running == last.num_running and prompt <= 0:
            self.decode_step_s = _average(self.decode_step_s, elapsed_s / steps)
            self.decode_batch = _average(self.decode_batch, drawn / steps)


def load_report(stats: EngineStats, meter: RateMeter, admitted: tuple[int, ...]) -> LoadReport:
    """What an ingress is told; `admitted` are its attempts that `stats` now include."""
    return LoadReport(
        num_blocks=stats.num_blocks,
        num_free_blocks=stats.num_free_blocks,
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        num_waiting_tokens=stats.num_waiting_tokens,
        num_running_tokens=stats.num_running_tokens,
        prefill_tokens_per_s=meter.prefill_tokens_per_s,
        decode_step_s=meter.decode_step_s,
        decode_batch=meter.decode_batch,
        admitted=admitted,
    )


def _average(old: float, sample: float) -> float:
    return sample if old == 0.0 else old + _WEIGHT * (sample - old)
