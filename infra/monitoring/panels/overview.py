"""Quire: overview. What users see, for whoever is on call."""

from __future__ import annotations

from infra.monitoring.panels.model import Dashboard, Panel, Query, Row
from infra.monitoring.panels.promql import (
    CLASS,
    FIRST_TOKEN_TARGET,
    MODEL,
    OF_CLASS,
    OF_MODEL,
    TOKEN_TARGET,
    quantiles,
    rate,
    total,
)

_FAILED = rate("quire_requests_total", OF_MODEL + ', code=~"5.."')
_REFUSED = rate("quire_admission_refused_total", OF_CLASS)
OVERVIEW = Dashboard(
    "quire-overview",
    "Quire: overview",
    "What users see: rate, errors, refusals, latencies, and whether enough replicas run.",
    (MODEL, CLASS, FIRST_TOKEN_TARGET, TOKEN_TARGET),
    (
        Row(
            "Now",
            (
                Panel(
                    "Alerts firing",
                    "short",
                    (Query('count(ALERTS{alertname=~"Quire.*", alertstate="firing"}) or vector(0)'),),
                    "docs/operations.md has what to do for each.",
                    kind="stat",
                    width=3,
                    red=1,
                ),
                Panel("Requests", "reqps", (Query(rate("quire_requests_total", OF_MODEL)),), kind="stat", width=3),
                Panel(
                    "Failed",
                    "percentunit",
                    (Query(f"({_FAILED} or vector(0)) / {rate('quire_requests_total', OF_MODEL)}"),),
                    "Of the requests that end, those that end with a 5xx.",
                    kind="stat",
                    width=3,
                    red=0.02,
                    alert="QuireErrors",
                ),
                Panel(
                    "Refused",
                    "percentunit",
                    (
                        Query(
                            f"({_REFUSED} or vector(0)) / "
                            f"(({_REFUSED} or vector(0)) + {rate('quire_admission_admitted_total', OF_CLASS)})"
                        ),
                    ),
                    "Of the requests that admission decided on, those that were answered with a 429.",
                    kind="stat",
                    width=3,
                    red=0.05,
                    alert="QuireRefusing",
                ),
                Panel(
                    "First token, p95",
                    "s",
                    (
                        Query(
                            "histogram_quantile(0.95, "
                            f"{rate('quire_time_to_first_token_seconds_bucket', OF_CLASS, 'le')})"
                        ),
                    ),
                    kind="stat",
                    width=3,
                    red=5,
                    alert="QuireSlowFirstToken",
                ),
                Panel(
                    "A token, p95",
                    "s",
                    (
                        Query(
                            "histogram_quantile(0.95, "
                            f"{rate('quire_time_per_output_token_seconds_bucket', OF_CLASS, 'le')})"
                        ),
                    ),
                    kind="stat",
                    width=3,
                    red=0.15,
                    alert="QuireSlowTokens",
                ),
                Panel(
                    "Replicas missing",
                    "short",
                    (
                        Query(
                            f"sum(quire_target_replicas{{{OF_MODEL}}}) - "
                            f'sum(quire_deployment_replicas{{{OF_MODEL}, state="running"}})'
                        ),
                    ),
                    "Those that there are to be, less those that run.",
                    kind="stat",
                    width=3,
                    red=1,
                    alert="QuireReplicasMissing",
                ),
                Panel(
                    "Ingresses",
                    "short",
                    (Query("max(quire_ingresses)"),),
                    "That answer the one which is scraped.",
                    kind="stat",
                    width=3,
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests by status",
                    "reqps",
                    (Query(rate("quire_requests_total", OF_MODEL, "model", "code"), "{{model}} {{code}}"),),
                    "499: the client went away.",
                    stacked=True,
                ),
                Panel(
                    "Requests being served",
                    "short",
                    (Query(total("quire_requests_open", OF_MODEL, "model"), "{{model}}"),),
                    "Those that wait for their turn included.",
                ),
                Panel(
                    "Tokens",
                    "cps",
                    (
                        Query(rate("quire_prompt_tokens_total", OF_MODEL, "model"), "{{model}} in"),
                        Query(rate("quire_cached_prompt_tokens_total", OF_MODEL, "model"), "{{model}} in, cached"),
                        Query(rate("quire_output_tokens_total", OF_MODEL, "model"), "{{model}} out"),
                    ),
                    "Of requests that have ended.",
                ),
            ),
        ),
        Row(
            "Latency by model and class",
            (
                Panel(
                    "Time to first token",
                    "s",
                    quantiles("quire_time_to_first_token_seconds"),
                    width=12,
                    red=5,
                    alert="QuireSlowFirstToken",
                ),
                Panel(
                    "Time per output token",
                    "s",
                    quantiles("quire_time_per_output_token_seconds"),
                    width=12,
                    red=0.15,
                    alert="QuireSlowTokens",
                ),
                Panel("Whole request", "s", quantiles("quire_request_duration_seconds"), width=8),
                Panel(
                    "Queue time",
                    "s",
                    quantiles("quire_request_queue_seconds"),
                    "From booking to the first step. If it is most of the first token's time, more replicas help.",
                ),
                Panel(
                    "First tokens by time",
                    "s",
                    (Query(rate("quire_time_to_first_token_seconds_bucket", OF_CLASS, "le"), "{{le}}"),),
                    kind="heatmap",
                ),
            ),
        ),
        Row(
            "Usage ledger",
            (
                Panel(
                    "Records written", "wps", (Query(rate("quire_usage_records_total", "", "ingress"), "{{ingress}}"),)
                ),
                Panel(
                    "Failures",
                    "ops",
                    (Query(rate("quire_usage_errors_total", "", "operation"), "{{operation}}"),),
                    "Each is tried again.",
                ),
                Panel(
                    "Requests without a record",
                    "short",
                    (Query("sum(increase(quire_usage_dropped_requests_total[30m]))", "in 30 minutes"),),
                    red=1,
                    alert="QuireUsageLost",
                ),
            ),
        ),
        Row(
            "Goodput",
            (
                Panel(
                    "First tokens in time",
                    "percentunit",
                    (
                        Query(
                            rate(
                                "quire_time_to_first_token_seconds_bucket", OF_CLASS + ', le="$ttft"', "model", "class"
                            )
                            + " / ("
                            + rate("quire_time_to_first_token_seconds_count", OF_CLASS, "model", "class")
                            + " + ("
                            + rate("quire_admission_refused_total", OF_CLASS, "model", "class")
                            + " or 0 * "
                            + rate("quire_time_to_first_token_seconds_count", OF_CLASS, "model", "class")
                            + "))",
                            "{{model}} {{class}}",
                        ),
                    ),
                    "Share of requests whose first token came within the time chosen above; none of the refused did.",
                    width=12,
                    maximum=1,
                ),
                Panel(
                    "Requests whose tokens come in time",
                    "percentunit",
                    (
                        Query(
                            rate(
                                "quire_time_per_output_token_seconds_bucket",
                                OF_CLASS + ', le="$tpot"',
                                "model",
                                "class",
                            )
                            + " / "
                            + rate("quire_time_per_output_token_seconds_count", OF_CLASS, "model", "class"),
                            "{{model}} {{class}}",
                        ),
                    ),
                    "Share of requests whose tokens came as fast as chosen above, on the mean of each.",
                    width=12,
                    maximum=1,
                ),
            ),
        ),
    ),
)
