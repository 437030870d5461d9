"""The request-aware balancer: bookings, cost, policy; no Ray but in `router`, the thin adapter for Serve."""

from app.balancer.balancer import Balancer, BookingGoneError, Placement
from app.balancer.cost import ReplicaLoad, RequestCost, cost_s
from app.balancer.policy import CheapestPolicy, Policy

__all__ = [
    "Balancer",
    "BookingGoneError",
    "CheapestPolicy",
    "Placement",
    "Policy",
    "ReplicaLoad",
    "RequestCost",
    "cost_s",
]
