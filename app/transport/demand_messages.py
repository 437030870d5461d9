"""How an ingress tells replicas what is asked of their model: DEMAND, for autoscaling.

Serve gathers what replicas export, and nothing else: so each ingress divides what it knows by the replicas that it is
connected to, and the sum over replicas is the whole, whatever the number of either. A map by name, as LOAD is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from app.transport.errors import FrameError
from app.transport.frames import Frame, encode_frame
from app.transport.messages import Kind


@dataclass(frozen=True, slots=True)
class DemandShare:
    """One replica's share of an ingress's demand for its model. All may be fractions.

    Attributes:
        share: of the ingress's whole; 1 over the replicas that were told.
        requests, prompt_tokens, prompt_squares, output_tokens: that have come since the last message: prompt tokens
            that no replica is expected to have cached, their squares request by request, and expected output. Held,
            queued and refused requests count.
        queued_s: seconds of one replica's work that wait in the ingress now.
    """

    share: float = 0.0
    requests: float = 0.0
    prompt_tokens: float = 0.0
    prompt_squares: float = 0.0
    output_tokens: float = 0.0
    queued_s: float = 0.0


_FIELDS = tuple(entry.name for entry in dataclasses.fields(DemandShare))


def encode_demand(share: DemandShare) -> bytes:
    """The DEMAND frame."""
    return encode_frame(Kind.DEMAND, {name: getattr(share, name) for name in _FIELDS})


def decode_demand(frame: Frame) -> DemandShare:
    """Unknown names are ignored, missing ones take their default. Raises FrameError."""
    try:
        values = frame.fields[0]
        share = DemandShare(**{name: float(values[name]) for name in _FIELDS if name in values})
    except (ValueError, TypeError, IndexError) as error:
        raise FrameError(f"malformed DEMAND: {error}") from error
    # A NaN would stay in every sum that it enters.
    if not all(0.0 <= getattr(share, name) < float("inf") for name in _FIELDS):
        raise FrameError(f"malformed DEMAND: negative or not finite: {share}")
    return share
