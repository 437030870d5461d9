"""How long it takes until a request's turn comes, and from there to its first token; learnt from how long it took."""

from __future__ import annotations

from app.balancer.booking import Booking
from app.balancer.service_rate import ServiceRate

# A prompt that takes nearly its deadline, or longer, may still wait for so much of it.
_LEAST_SLACK = 0.1
# Weight of a request in what first tokens take on replicas; they are not taken to be slower than foreseen by more.
_WEIGHT = 0.05
_MOST_STRETCH = 8.0
# Of what they take, 95 in 100 deviate by less than so many mean deviations.
_DEVIATIONS = 2.0


class Foresight:
    """Of one model, in one ingress. Work is in replica-seconds.

    Attributes:
        num_replicas: that there were when time was last told.
    """

    def __init__(self) -> None:
        self.num_replicas = 0
        self._rate = ServiceRate()
        # Moving averages of seconds from a replica's choice to the first token, as foreseen and as they came.
        self._foreseen_s = self._taken_s = 1e-3
        self._deviation_s = 0.0

    def advance(self, now: float, num_replicas: int, *, waiting: bool) -> None:
        """Time has passed until now; whether anybody waits now, for so many replicas."""
        self.num_replicas = num_replicas
        self._rate.advance(now, waiting, num_replicas)

    def sent(self, booking: Booking) -> None:
        """It goes to a replica."""
        self._rate.sent(booking.work_s)

    def computed(self, booking: Booking, now: float) -> None:
        """It has its first token: how long that took on its replica is what others will find there."""
        foreseen_s, taken_s = booking.predicted_wait_s + booking.prefill_s, now - booking.booked_at
        self._deviation_s += _WEIGHT * (abs(taken_s - self._stretch * foreseen_s) - self._deviation_s)
        self._foreseen_s += _WEIGHT * (foreseen_s - self._foreseen_s)
        self._taken_s += _WEIGHT * (taken_s - self._taken_s)

    @property
    def rate(self) -> float:
        """Work that is served a second; above 0 for at least one replica."""
        return self._rate.rate(self.num_replicas)

    def slack_s(self, prefill_s: float, queue_s: float, deadline_s: float) -> float:
        """How long a request may wait here, for its first token to come in time.

        Args:
            prefill_s: that its prompt takes.
            queue_s: prompts that it may find on its replica.
        """
        # Decodes of others slow a prompt down, and so do calls and a busy machine.
        there_s = self._stretch * (prefill_s + queue_s) + _DEVIATIONS * self._deviation_s
        return max(deadline_s - there_s, _LEAST_SLACK * deadline_s)

    @property
    def _stretch(self) -> float:
        return min(max(self._taken_s / self._foreseen_s, 1.0), _MOST_STRETCH)
