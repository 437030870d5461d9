"""Quire: balancer and admission. Where requests are sent, what waits, and what is refused."""

from __future__ import annotations

from infra.monitoring.panels.model import Dashboard, Panel, Query, Row
from infra.monitoring.panels.promql import CLASS, MODEL, OF_CLASS, OF_MODEL, rate, total

BALANCER = Dashboard(
    "quire-balancer",
    "Quire: balancer and admission",
    "Where requests are sent and why, what waits, and what is refused.",
    (MODEL, CLASS),
    (
        Row(
            "Decisions",
            (
                Panel(
                    "Bookings made",
                    "reqps",
                    (
                        Query(
                            rate("quire_balancer_decisions_total", OF_MODEL, "model", "outcome"),
                            "{{model}} {{outcome}}",
                        ),
                    ),
                    "Placed on a replica, held for one to come free, or unplaced as there was none.",
                    stacked=True,
                ),
                Panel(
                    "Booked and held now",
                    "short",
                    (
                        Query(total("quire_balancer_bookings", OF_MODEL, "model"), "{{model}} booked"),
                        Query(total("quire_balancer_held_requests", OF_MODEL, "model"), "{{model}} held"),
                    ),
                ),
                Panel(
                    "Requests on each replica",
                    "short",
                    (
                        Query(
                            total("quire_engine_requests", OF_MODEL, "model", "replica"),
                            "{{model}} {{replica}}",
                        ),
                    ),
                    "How even the load is. Unlike numbers are right where prefixes are shared.",
                ),
                Panel(
                    "Wrong routes",
                    "percentunit",
                    (
                        Query(
                            rate("quire_balancer_wrong_routes_total", OF_MODEL, "model")
                            + " / "
                            + rate("quire_balancer_decisions_total", OF_MODEL, "model"),
                            "{{model}}",
                        ),
                    ),
                    "Of the bookings, those whose replica had at least a block less cached than was counted on.",
                    red=0.1,
                    alert="QuireWrongRoutes",
                ),
                Panel(
                    "Begun elsewhere",
                    "percentunit",
                    (
                        Query(
                            rate("quire_balancer_resubmissions_total", OF_MODEL, "model")
                            + " / "
                            + rate("quire_balancer_decisions_total", OF_MODEL, "model"),
                            "{{model}}",
                        ),
                    ),
                    "Of the bookings, those of requests whose replica was lost, failed, drained or was full.",
                    red=0.05,
                    alert="QuireResubmitting",
                ),
                Panel(
                    "Prompt tokens found cached",
                    "percentunit",
                    (
                        Query(
                            rate("quire_prefix_cache_hit_tokens_total", OF_MODEL, "model")
                            + " / "
                            + rate("quire_prefix_cache_queried_tokens_total", OF_MODEL, "model"),
                            "{{model}} found",
                        ),
                        Query(
                            rate("quire_balancer_expected_cached_tokens_total", OF_MODEL, "model")
                            + " / "
                            + rate("quire_prefix_cache_queried_tokens_total", OF_MODEL, "model"),
                            "{{model}} counted on",
                        ),
                    ),
                    "Hit rate of the prefix caches, and what the balancer had counted on.",
                    maximum=1,
                ),
            ),
        ),
        Row(
            "Admission by model and class",
            (
                Panel(
                    "Waiting",
                    "short",
                    (
                        Query(
                            total("quire_admission_queued_requests", OF_CLASS, "model", "class"), "{{model}} {{class}}"
                        ),
                    ),
                    "In the ingresses, for their turn.",
                    red=1,
                    alert="QuireQueueStanding",
                ),
                Panel(
                    "Admitted",
                    "reqps",
                    (Query(rate("quire_admission_admitted_total", OF_CLASS, "model", "class"), "{{model}} {{class}}"),),
                    stacked=True,
                ),
                Panel(
                    "Refused",
                    "reqps",
                    (
                        Query(
                            rate("quire_admission_refused_total", OF_CLASS, "model", "class", "reason"),
                            "{{model}} {{class}} {{reason}}",
                        ),
                    ),
                    "`deadline`, `late`: too late. `full`: nothing more may wait. `shed`: gone for a higher class.",
                    stacked=True,
                ),
                Panel(
                    "Mean wait of the admitted",
                    "s",
                    (
                        Query(
                            rate("quire_admission_wait_seconds_total", OF_CLASS, "model", "class")
                            + " / "
                            + rate("quire_admission_admitted_total", OF_CLASS, "model", "class"),
                            "{{model}} {{class}}",
                        ),
                    ),
                ),
                Panel(
                    "Came again when told to",
                    "reqps",
                    (
                        Query(
                            rate("quire_admission_retries_admitted_total", OF_CLASS, "model", "class"),
                            "{{model}} {{class}}",
                        ),
                    ),
                    "Admitted requests that had been refused before.",
                ),
                Panel(
                    "Promises open",
                    "short",
                    (Query(total("quire_admission_promises_open", OF_MODEL, "model"), "{{model}}"),),
                    "Refused requests that are expected to come again.",
                ),
            ),
        ),
    ),
)
