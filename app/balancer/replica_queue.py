"""How many seconds of prompt a replica may have to compute for a request to be sent there rather than to wait here.

What is sent can be overtaken no more, so it is little; but a replica that has computed all it has is idle until it
hears of more.
"""

from __future__ import annotations

import random

from app.balancer.admission_settings import AdmissionSettings

# So much of the shortest deadline.
_SHARE = 0.02
# Less would leave a replica idle until the next request comes.
_LEAST_S = 0.02
# A request of a tenant within its share, or one that was told to come now, may find so many times that there: so it
# goes before those that wait at other ingresses, too.
_DUE = 3.0
# Ingresses that all have somebody waiting would all send to a replica as it comes free. Each draws how full it may be,
# so that mostly one of them does, and the others hear of it.
_SHARES = (0.6, 1.2)


class ReplicaQueue:
    """Of one model, in one ingress.

    Attributes:
        seconds: as it is without competition.

    Args:
        draw: where chance comes from.
    """

    def __init__(self, settings: AdmissionSettings, draw: random.Random) -> None:
        self._draw = draw
        self._competes = False
        self._drawn = 1.0
        self.seconds = 0.0
        self.reconfigure(settings)

    def reconfigure(self, settings: AdmissionSettings) -> None:
        """Go by other settings from now on."""
        shortest_s = min(entry.ttft_deadline_s for entry in settings.classes.values())
        self.seconds = min(settings.replica_queue_s, max(_SHARE * shortest_s, _LEAST_S))

    def compete(self) -> None:
        """Another ingress sends to the same replicas."""
        self._competes = True

    def sent(self) -> None:
        """A request was sent to a replica."""
        if self._competes:
            self._drawn = self._draw.uniform(*_SHARES)

    def longest_s(self, *, is_due: bool) -> float:
        """For the next request; `is_due`: it is to go before those that wait at other ingresses."""
        return (_DUE if is_due else self._drawn) * self.seconds
