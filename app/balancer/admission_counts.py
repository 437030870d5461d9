"""What became of requests at admission, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from app.balancer.booking import Booking
from app.balancer.terms import RefusalReason


@dataclass(slots=True)
class AdmissionCounts:
    """What became of requests since the start, by class; refused ones by class and reason. `waited_s` is the sum over
    those that were sent on; of those, `promised` had been told to come."""

    admitted: dict[str, int] = field(default_factory=dict)
    waited_s: dict[str, float] = field(default_factory=dict)
    promised: dict[str, int] = field(default_factory=dict)
    refused: dict[tuple[str, RefusalReason], int] = field(default_factory=dict)

    def sent(self, booking: Booking, now: float) -> None:
        """It goes to a replica."""
        name = booking.terms.class_name
        self.admitted[name] = self.admitted.get(name, 0) + 1
        self.waited_s[name] = self.waited_s.get(name, 0.0) + now - booking.arrived_at
        if booking.promised:
            self.promised[name] = self.promised.get(name, 0) + 1

    def refuse(self, booking: Booking, reason: RefusalReason) -> None:
        """It is refused."""
        counted = (booking.terms.class_name, reason)
        self.refused[counted] = self.refused.get(counted, 0) + 1


class AdmissionState(NamedTuple):
    """For metrics: the counts, and now by class how many wait; promises that are open; the share of them kept."""

    counts: AdmissionCounts = AdmissionCounts()
    queued: Mapping[str, int] = MappingProxyType({})
    num_promises: int = 0
    attendance: float = 1.0
