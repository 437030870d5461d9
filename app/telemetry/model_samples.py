"""Samples of one served model: what its client's balancer did, and what its replicas have told of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from app.balancer.admission_counts import AdmissionState
from app.telemetry import metrics
from app.telemetry.samples import MetricSample, sample
from app.transport.counter_messages import ReplicaCounters


@dataclass(slots=True)
class RouteCounts:
    """What became of a model's requests on their way to a replica, since the client began.

    `wrong` are those whose replica had at least a block less cached than was counted on.
    """

    placed: int = 0
    held: int = 0
    unplaced: int = 0
    resubmitted: int = 0
    expected_cached_tokens: int = 0
    wrong: int = 0


class ModelTelemetry(NamedTuple):
    """What a ModelClient knows of its model for `/metrics`. `replicas` by id; `num_replicas` can take requests."""

    routes: RouteCounts
    num_bookings: int
    num_held: int
    num_replicas: int
    replicas: Mapping[str, ReplicaCounters]
    admission: AdmissionState = AdmissionState()


class ScalingTelemetry(NamedTuple):
    """What Serve's controller and autoscaling's policy say of a model: of the cluster, whoever is asked.

    Attributes:
        target: replicas that there are to be.
        states: state → replicas in it.
        decisions: direction and cause → how often; empty if the model does not autoscale.
    """

    target: int
    states: Mapping[str, int]
    decisions: Mapping[tuple[str, str], int]


def routing_samples(model_id: str, told: ModelTelemetry) -> list[MetricSample]:
    """This ingress's own part: its routing."""
    routes = told.routes
    return [
        sample(metrics.DECISIONS, routes.placed, model_id, "placed"),
        sample(metrics.DECISIONS, routes.held, model_id, "held"),
        sample(metrics.DECISIONS, routes.unplaced, model_id, "unplaced"),
        sample(metrics.RESUBMISSIONS, routes.resubmitted, model_id),
        sample(metrics.EXPECTED_CACHED_TOKENS, routes.expected_cached_tokens, model_id),
        sample(metrics.WRONG_ROUTES, routes.wrong, model_id),
        sample(metrics.BOOKINGS, told.num_bookings, model_id),
        sample(metrics.HELD, told.num_held, model_id),
        *admission_samples(model_id, told.admission),
    ]


def admission_samples(model_id: str, told: AdmissionState) -> list[MetricSample]:
    """What waits in this ingress, what was sent on and what was refused, by class."""
    counts = told.counts
    refused = counts.refused.items()
    return [
        *(sample(metrics.ADMISSION_QUEUED, value, model_id, name) for name, value in told.queued.items()),
        *(sample(metrics.ADMITTED, value, model_id, name) for name, value in counts.admitted.items()),
        *(sample(metrics.ADMISSION_WAIT, value, model_id, name) for name, value in counts.waited_s.items()),
        *(sample(metrics.PROMISES_KEPT, value, model_id, name) for name, value in counts.promised.items()),
        *(sample(metrics.REFUSED, value, model_id, name, reason) for (name, reason), value in refused),
        sample(metrics.PROMISES_OPEN, told.num_promises, model_id),
    ]


def replica_samples(model_id: str, told: ModelTelemetry) -> list[MetricSample]:
    """What every ingress knows alike: the model's replicas."""
    samples = [sample(metrics.REPLICAS, told.num_replicas, model_id)]
    for replica_id, counters in told.replicas.items():
        samples += counter_samples(model_id, replica_id, counters)
    return samples


def scaling_samples(model_id: str, told: ScalingTelemetry) -> list[MetricSample]:
    """How many replicas there are to be and are, and what was decided."""
    return [
        sample(metrics.TARGET_REPLICAS, told.target, model_id),
        *(sample(metrics.DEPLOYMENT_REPLICAS, value, model_id, state) for state, value in told.states.items()),
        *(sample(metrics.SCALING_DECISIONS, value, model_id, *key) for key, value in told.decisions.items()),
    ]


def counter_samples(model_id: str, replica_id: str, counters: ReplicaCounters) -> list[MetricSample]:
    """One replica's numbers."""
    at = (model_id, replica_id)
    kinds = {
        "token_states": counters.token_state_slots,
        "reserved": counters.reserved_slots,
        "internal_fragmentation": counters.internal_fragmentation_slots,
        "rounding": counters.rounding_slots,
        "external_fragmentation": counters.external_fragmentation_slots,
        "cached": counters.cached_slots,
        "empty": counters.empty_slots,
    }
    phases = {"schedule": counters.schedule_s, "execute": counters.execute_s, "process": counters.process_s}
    return [
        *(sample(metrics.KV_SLOTS, value, *at, kind) for kind, value in kinds.items()),
        sample(metrics.SWAP_SLOTS, counters.swapped_slots, *at, "used"),
        sample(metrics.SWAP_SLOTS, counters.free_swap_slots, *at, "free"),
        sample(metrics.ENGINE_REQUESTS, counters.num_running, *at, "running"),
        sample(metrics.ENGINE_REQUESTS, counters.num_waiting - counters.num_swapped, *at, "waiting"),
        sample(metrics.ENGINE_REQUESTS, counters.num_swapped, *at, "swapped"),
        sample(metrics.PREEMPTIONS, counters.num_swaps, *at, "swap"),
        sample(metrics.PREEMPTIONS, counters.num_recomputations, *at, "recompute"),
        sample(metrics.PREFIX_QUERIES, counters.num_prompt_tokens, *at),
        sample(metrics.PREFIX_HITS, counters.num_cached_tokens, *at),
        sample(metrics.ENGINE_OUTPUT_TOKENS, counters.num_output_tokens, *at),
        sample(metrics.STEPS, counters.num_steps, *at),
        *(sample(metrics.STEP_TIME, value, *at, phase) for phase, value in phases.items()),
        sample(metrics.ADAPTERS, counters.num_adapters, *at),
        sample(metrics.ADAPTER_BYTES, counters.adapter_bytes, *at),
        sample(metrics.ADAPTER_LOADS, counters.num_adapter_loads, *at),
        sample(metrics.ADAPTER_EVICTIONS, counters.num_adapter_evictions, *at),
        sample(metrics.ADAPTER_LOAD_TIME, counters.adapter_load_s, *at),
        sample(metrics.ADAPTER_FAILURES, counters.num_adapter_load_failures, *at),
    ]
