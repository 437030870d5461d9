"""Quire: replicas and adapters. How many there are and should be, and what autoscaling decided."""

from __future__ import annotations

from infra.monitoring.panels.model import Dashboard, Panel, Query, Row
from infra.monitoring.panels.promql import FREE, MODEL, OF_MODEL, SLOTS, rate, total

ELASTICITY = Dashboard(
    "quire-elasticity",
    "Quire: replicas and adapters",
    "How many replicas there are and should be, what autoscaling decided, and which adapters come and go.",
    (MODEL,),
    (
        Row(
            "Replicas",
            (
                Panel(
                    "To be, running, reachable",
                    "short",
                    (
                        Query(f"max by (model) (quire_target_replicas{{{OF_MODEL}}})", "{{model}} to be"),
                        Query(
                            f'max by (model) (quire_deployment_replicas{{{OF_MODEL}, state="running"}})',
                            "{{model}} running",
                        ),
                        Query(f"max by (model) (quire_replicas{{{OF_MODEL}}})", "{{model}} reachable"),
                    ),
                    "Reachable: the ingress that is scraped can send requests there.",
                    width=12,
                ),
                Panel(
                    "By state",
                    "short",
                    (
                        Query(
                            f"max by (model, state) (quire_deployment_replicas{{{OF_MODEL}}})",
                            "{{model}} {{state}}",
                        ),
                    ),
                    stacked=True,
                    width=12,
                ),
                Panel(
                    "Changes of the replicas, 30 min",
                    "short",
                    (Query(f"max by (model) (changes(quire_replicas{{{OF_MODEL}}}[30m]))", "{{model}}"),),
                    red=10,
                    alert="QuireReplicasFlapping",
                ),
                Panel("Ingresses", "short", (Query("max(quire_ingresses)", "answering"),)),
                Panel(
                    "Waiting for replicas",
                    "short",
                    (
                        Query(total("quire_admission_queued_requests", OF_MODEL, "model"), "{{model}} in ingresses"),
                        Query(
                            total("quire_engine_requests", OF_MODEL + ', state="waiting"', "model"),
                            "{{model}} on replicas",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Autoscaling",
            (
                Panel(
                    "Decisions",
                    "short",
                    (
                        Query(
                            "sum by (model, direction, cause) "
                            f"(increase(quire_scaling_decisions_total{{{OF_MODEL}}}[$__rate_interval]))",
                            "{{model}} {{direction}}: {{cause}}",
                        ),
                    ),
                    "Up for prompts, a queue, sequences, KV or a new minimum; down for spare replicas or idleness.",
                    width=12,
                ),
                Panel(
                    "KV cache held by requests, mean",
                    "percentunit",
                    (
                        Query(
                            f"1 - {total(SLOTS, OF_MODEL + FREE, 'model')} / {total(SLOTS, OF_MODEL, 'model')}",
                            "{{model}}",
                        ),
                    ),
                    maximum=1,
                    width=12,
                ),
            ),
        ),
        Row(
            "Adapters",
            (
                Panel(
                    "Resident",
                    "short",
                    (Query(total("quire_resident_adapters", OF_MODEL, "model", "replica"), "{{model}} {{replica}}"),),
                ),
                Panel(
                    "Memory",
                    "bytes",
                    (
                        Query(
                            total("quire_adapter_memory_bytes", OF_MODEL, "model", "replica"), "{{model}} {{replica}}"
                        ),
                    ),
                ),
                Panel(
                    "Loaded and evicted",
                    "ops",
                    (
                        Query(rate("quire_adapter_loads_total", OF_MODEL, "model"), "{{model}} loaded"),
                        Query(rate("quire_adapter_evictions_total", OF_MODEL, "model"), "{{model}} evicted"),
                        Query(rate("quire_adapter_load_failures_total", OF_MODEL, "model"), "{{model}} failed"),
                    ),
                    red=0.1,
                    alert="QuireAdaptersThrashing",
                ),
                Panel(
                    "Mean load",
                    "s",
                    (
                        Query(
                            rate("quire_adapter_load_seconds_total", OF_MODEL, "model")
                            + " / "
                            + rate("quire_adapter_loads_total", OF_MODEL, "model"),
                            "{{model}}",
                        ),
                    ),
                    "From the first request that lacked one to its being ready.",
                ),
            ),
        ),
    ),
)
