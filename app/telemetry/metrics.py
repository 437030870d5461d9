"""The one table of Quire's metrics: name, type, help, labels, buckets. Units are Prometheus' base units, in the name.

What a label can say is bounded by the configuration: `model` is the id of a served model, never what a request wrote;
`class` is one of that model's admission classes, as a request for any other is refused; `replica` and `ingress` name
living processes; all others are listed here or are HTTP statuses that Quire answers with. Every observation is of a
request, a routing decision or a report of a replica; none is of a token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

MetricType = Literal["counter", "gauge", "histogram"]


class MetricDefinition(NamedTuple):
    """One metric. A counter's name ends in `_total`; a histogram's buckets are upper bounds without infinity."""

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()


# From a cached prompt on an idle replica to a long one behind a queue.
_WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_REQUEST_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_MODEL = ("model",)
_CLASS = ("model", "class")
_REPLICA = ("model", "replica")

# Counted where a request is served. `/metrics` adds the label `ingress`.
REQUESTS = MetricDefinition(
    "quire_requests_total",
    "counter",
    "Generation requests that have ended, by HTTP status; 499: the client went away. Model is empty if none was found.",
    ("model", "endpoint", "code"),
)
TIME_TO_FIRST_TOKEN = MetricDefinition(
    "quire_time_to_first_token_seconds", "histogram", "From a request's arrival to its first token.", _CLASS, _WAIT_S
)
TIME_PER_OUTPUT_TOKEN = MetricDefinition(
    "quire_time_per_output_token_seconds",
    "histogram",
    "Mean time between a request's tokens after its first, one observation a request.",
    _CLASS,
    _TOKEN_S,
)
REQUEST_DURATION = MetricDefinition(
    "quire_request_duration_seconds",
    "histogram",
    "From a request's arrival to the end of its answer.",
    _CLASS,
    _REQUEST_S,
)
QUEUE_TIME = MetricDefinition(
    "quire_request_queue_seconds",
    "histogram",
    "From a request's booking to its first step on a replica, held requests included.",
    _CLASS,
    _WAIT_S,
)
PROMPT_TOKENS = MetricDefinition(
    "quire_prompt_tokens_total", "counter", "Prompt tokens of requests that have ended.", _MODEL
)
CACHED_PROMPT_TOKENS = MetricDefinition(
    "quire_cached_prompt_tokens_total", "counter", "Of the prompt tokens, those found in a prefix cache.", _MODEL
)
OUTPUT_TOKENS = MetricDefinition(
    "quire_output_tokens_total", "counter", "Tokens produced for requests that have ended.", _MODEL
)
OPEN_REQUESTS = MetricDefinition("quire_requests_open", "gauge", "Requests that are being served now.", _MODEL)
DECISIONS = MetricDefinition(
    "quire_balancer_decisions_total",
    "counter",
    "Bookings as they were made: placed on a replica, held for one to come free, or unplaced as there was none.",
    ("model", "outcome"),
)
RESUBMISSIONS = MetricDefinition(
    "quire_balancer_resubmissions_total",
    "counter",
    "Requests that went on elsewhere: their replica was lost, failed, drained or was full.",
    _MODEL,
)
EXPECTED_CACHED_TOKENS = MetricDefinition(
    "quire_balancer_expected_cached_tokens_total",
    "counter",
    "Prompt tokens that the chosen replicas had cached as the balancer knew it.",
    _MODEL,
)
WRONG_ROUTES = MetricDefinition(
    "quire_balancer_wrong_routes_total",
    "counter",
    "Requests whose replica had at least one block less cached than the balancer had counted on.",
    _MODEL,
)
BOOKINGS = MetricDefinition("quire_balancer_bookings", "gauge", "Requests booked now.", _MODEL)
HELD = MetricDefinition("quire_balancer_held_requests", "gauge", "Requests held back for a replica now.", _MODEL)
ADMISSION_QUEUED = MetricDefinition(
    "quire_admission_queued_requests", "gauge", "Requests that wait in the ingress for their turn now.", _CLASS
)
ADMITTED = MetricDefinition(
    "quire_admission_admitted_total", "counter", "Requests that were sent to a replica, the first time.", _CLASS
)
ADMISSION_WAIT = MetricDefinition(
    "quire_admission_wait_seconds_total", "counter", "How long admitted requests had waited in the ingress.", _CLASS
)
PROMISES_KEPT = MetricDefinition(
    "quire_admission_retries_admitted_total",
    "counter",
    "Of the admitted requests, those that had been refused before and came again when they were told to.",
    _CLASS,
)
REFUSED = MetricDefinition(
    "quire_admission_refused_total",
    "counter",
    "Requests answered with 429: too late as foreseen at arrival (deadline), nothing more may wait (full), gone for "
    "others that go first (shed), too late after all (late).",
    (*_CLASS, "reason"),
)
PROMISES_OPEN = MetricDefinition(
    "quire_admission_promises_open", "gauge", "Refused requests that are expected to come again.", _MODEL
)

# Told by the replicas to every ingress, so that any of them can answer.
KV_SLOTS = MetricDefinition(
    "quire_kv_cache_slots",
    "gauge",
    "Token slots of the KV pool by what they are held for; the kinds add up to the pool.",
    (*_REPLICA, "kind"),
)
SWAP_SLOTS = MetricDefinition(
    "quire_kv_swap_slots", "gauge", "Token slots of the swap pool in host memory.", (*_REPLICA, "state")
)
ENGINE_REQUESTS = MetricDefinition(
    "quire_engine_requests",
    "gauge",
    "Requests in a replica: running, waiting with nothing held, or waiting swapped out.",
    (*_REPLICA, "state"),
)
PREEMPTIONS = MetricDefinition(
    "quire_preemptions_total", "counter", "Sequence groups preempted, by what became of their KV.", (*_REPLICA, "kind")
)
PREFIX_QUERIES = MetricDefinition(
    "quire_prefix_cache_queried_tokens_total", "counter", "Prompt tokens of requests that a replica took.", _REPLICA
)
PREFIX_HITS = MetricDefinition(
    "quire_prefix_cache_hit_tokens_total",
    "counter",
    "Of the queried tokens, those found in the cache.",
    _REPLICA,
)
ENGINE_OUTPUT_TOKENS = MetricDefinition(
    "quire_engine_output_tokens_total", "counter", "Tokens that a replica has drawn.", _REPLICA
)
STEPS = MetricDefinition("quire_engine_steps_total", "counter", "Steps that a replica has run.", _REPLICA)
STEP_TIME = MetricDefinition(
    "quire_engine_step_seconds_total",
    "counter",
    "Time of a replica's steps: choosing the batch, waiting for the device, taking its tokens over.",
    (*_REPLICA, "phase"),
)
ADAPTERS = MetricDefinition(
    "quire_resident_adapters", "gauge", "LoRA adapters that a replica has or is loading.", _REPLICA
)
ADAPTER_BYTES = MetricDefinition("quire_adapter_memory_bytes", "gauge", "Memory that resident adapters take.", _REPLICA)
ADAPTER_FAILURES = MetricDefinition(
    "quire_adapter_load_failures_total",
    "counter",
    "Loads of adapters that failed, and with them the requests that waited for them.",
    _REPLICA,
)
ADAPTER_LOADS = MetricDefinition("quire_adapter_loads_total", "counter", "Adapters that were loaded.", _REPLICA)
ADAPTER_EVICTIONS = MetricDefinition(
    "quire_adapter_evictions_total", "counter", "Adapters that made room for another.", _REPLICA
)
ADAPTER_LOAD_TIME = MetricDefinition(
    "quire_adapter_load_seconds_total",
    "counter",
    "Time of all loads of adapters, from the first request that lacked one to its being ready.",
    _REPLICA,
)

# Of the answer itself.
REPLICAS = MetricDefinition("quire_replicas", "gauge", "Replicas that can take a request.", _MODEL)
TARGET_REPLICAS = MetricDefinition(
    "quire_target_replicas", "gauge", "Replicas that there are to be: as configured, or as autoscaling decides.", _MODEL
)
DEPLOYMENT_REPLICAS = MetricDefinition(
    "quire_deployment_replicas",
    "gauge",
    "Replicas by state, as Serve has it: starting, running, stopping; updating, recovering, pending_migration.",
    ("model", "state"),
)
SCALING_DECISIONS = MetricDefinition(
    "quire_scaling_decisions_total",
    "counter",
    "Decisions of autoscaling for more or fewer replicas, by what more were needed for, or why fewer are enough.",
    ("model", "direction", "cause"),
)
INGRESSES = MetricDefinition("quire_ingresses", "gauge", "Ingress replicas whose numbers this answer includes.", ())

USAGE_RECORDS = MetricDefinition(
    "quire_usage_records_total", "counter", "Records that the usage ledger has written; each is a line.", ()
)
USAGE_DROPPED = MetricDefinition(
    "quire_usage_dropped_requests_total",
    "counter",
    "Requests that the usage ledger has no record of: its disk failed for too long.",
    (),
)
USAGE_ERRORS = MetricDefinition(
    "quire_usage_errors_total",
    "counter",
    "Failures of the usage ledger, each tried again: write, sync, roll (begin a segment), lost (a segment has vanished "
    "with what it had), roll_up (totals of days), copy (to S3).",
    ("operation",),
)

INGRESS_METRICS = (
    REQUESTS,
    TIME_TO_FIRST_TOKEN,
    TIME_PER_OUTPUT_TOKEN,
    REQUEST_DURATION,
    QUEUE_TIME,
    PROMPT_TOKENS,
    CACHED_PROMPT_TOKENS,
    OUTPUT_TOKENS,
    OPEN_REQUESTS,
    DECISIONS,
    RESUBMISSIONS,
    EXPECTED_CACHED_TOKENS,
    WRONG_ROUTES,
    BOOKINGS,
    HELD,
    ADMISSION_QUEUED,
    ADMITTED,
    ADMISSION_WAIT,
    PROMISES_KEPT,
    REFUSED,
    PROMISES_OPEN,
    USAGE_RECORDS,
    USAGE_DROPPED,
    USAGE_ERRORS,
)
REPLICA_METRICS = (
    KV_SLOTS,
    SWAP_SLOTS,
    ENGINE_REQUESTS,
    PREEMPTIONS,
    PREFIX_QUERIES,
    PREFIX_HITS,
    ENGINE_OUTPUT_TOKENS,
    STEPS,
    STEP_TIME,
    ADAPTERS,
    ADAPTER_BYTES,
    ADAPTER_LOADS,
    ADAPTER_EVICTIONS,
    ADAPTER_LOAD_TIME,
    ADAPTER_FAILURES,
)
SCALING_METRICS = (REPLICAS, TARGET_REPLICAS, DEPLOYMENT_REPLICAS, SCALING_DECISIONS)
ALL_METRICS = (*INGRESS_METRICS, *REPLICA_METRICS, *SCALING_METRICS, INGRESSES)
