"""How fast what waits here is served: measured while anything waits, so that it is this ingress's own share."""

from __future__ import annotations

import math

# Seconds of waiting over which the measurement is taken, and for how many the assumption before it counts.
_MEMORY_S = 4.0
_ASSUMED_FOR_S = 2.0
# Moments in which nobody waits are part of it: another ingress is served meanwhile.
_PAUSE_S = 1.0
_LEAST = 0.02
# Weight of one more request in the mean of their work.
_WEIGHT = 0.1


class ServiceRate:
    """Work sent on, per second and replica, while some waited. Work is in replica-seconds as the balancer reckons them:
    what it gets wrong of all requests alike, and what other ingresses take, is in the rate.
    """

    def __init__(self) -> None:
        # As if a replica had done just its work, for a moment.
        self._work_s = self._replica_s = _ASSUMED_FOR_S
        self._now = 0.0
        self._waited_at = -math.inf
        # Since somebody waited last: counts once somebody does again, if that is soon.
        self._pause_work_s = self._pause_replica_s = 0.0
        self._mean_work_s = self._since_sent_s = 0.0

    def advance(self, now: float, waiting: bool, num_replicas: int) -> None:
        """Time has passed until now; whether anybody waits now, for so many replicas."""
        passed_s = max(now - self._now, 0.0) * num_replicas
        self._pause_replica_s += passed_s
        self._since_sent_s += passed_s
        self._now = now
        if not (waiting and num_replicas):
            return
        if now - self._waited_at <= _PAUSE_S:
            fade = math.exp(-(now - self._waited_at) / _MEMORY_S)
            self._work_s = self._work_s * fade + self._pause_work_s
            self._replica_s = self._replica_s * fade + self._pause_replica_s
        self._waited_at = now
        self._pause_work_s = self._pause_replica_s = 0.0

    def sent(self, work_s: float) -> None:
        """So much has been sent to a replica."""
        self._pause_work_s += work_s
        self._mean_work_s += _WEIGHT * (work_s - self._mean_work_s) if self._mean_work_s else work_s
        self._since_sent_s = 0.0

    def rate(self, num_replicas: int) -> float:
        """Replica-seconds of work a second; above 0 for at least one replica."""
        each = self._work_s / self._replica_s
        # Long requests are sent rarely: what replicas do meanwhile is part of the next.
        each += min(each * self._since_sent_s, self._mean_work_s) / self._replica_s
        # Nothing sent for a while is a pause and no standstill.
        return max(each, _LEAST) * num_replicas
