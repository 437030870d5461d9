"""The request-aware balancer: bookings, cost, policy; no Ray but in `router`, the thin adapter for Serve."""

from app.balancer.balancer import Balancer
from app.balancer.booking import BookingGoneError, Placement, RouteReceipt
from app.balancer.cost import CostWeights, ReplicaLoad, RequestCost, cost_s
from app.balancer.policies import POLICIES, make_policy
from app.balancer.policy import CheapestPolicy, Choice, Policy
from app.balancer.terms import RequestTerms

__all__ = [
    "POLICIES",
    "Balancer",
    "BookingGoneError",
    "CheapestPolicy",
    "Choice",
    "CostWeights",
    "Placement",
    "Policy",
    "ReplicaLoad",
    "RequestCost",
    "RequestTerms",
    "RouteReceipt",
    "cost_s",
    "make_policy",
]
