"""Quire: engine. KV cache, batches, preemptions, and where a step's time goes."""

from __future__ import annotations

from infra.monitoring.panels.model import Dashboard, Panel, Query, Row
from infra.monitoring.panels.promql import FREE, MODEL, OF_REPLICA, REPLICA, SLOTS, rate, total

ENGINE = Dashboard(
    "quire-engine",
    "Quire: engine",
    "What the replicas' engines do: KV cache, batches, preemptions, and where a step's time goes.",
    (MODEL, REPLICA),
    (
        Row(
            "KV cache",
            (
                Panel(
                    "Slots by what they are held for",
                    "short",
                    (Query(total(SLOTS, OF_REPLICA, "kind"), "{{kind}}"),),
                    "A slot has one token's keys and values. `cached` can be taken at any time.",
                    stacked=True,
                ),
                Panel(
                    "Held by requests",
                    "percentunit",
                    (
                        Query(
                            f"1 - {total(SLOTS, OF_REPLICA + FREE, 'model', 'replica')}"
                            f" / {total(SLOTS, OF_REPLICA, 'model', 'replica')}",
                            "{{model}} {{replica}}",
                        ),
                    ),
                    maximum=1,
                    red=0.95,
                    alert="QuireKvCacheFull",
                ),
                Panel(
                    "Fragmentation",
                    "percentunit",
                    (
                        Query(
                            total(
                                SLOTS,
                                OF_REPLICA
                                + ', kind=~"reserved|internal_fragmentation|rounding|external_fragmentation"',
                                "kind",
                            )
                            + f" / scalar({total(SLOTS, OF_REPLICA)})",
                            "{{kind}}",
                        ),
                    ),
                    "Of all slots, those that requests hold without a token in them. High: a smaller block_size.",
                    stacked=True,
                ),
                Panel(
                    "Swap pool",
                    "short",
                    (Query(total("quire_kv_swap_slots", OF_REPLICA, "state"), "{{state}}"),),
                    "Slots in host memory.",
                    stacked=True,
                    width=12,
                ),
                Panel(
                    "Preemptions",
                    "ops",
                    (Query(rate("quire_preemptions_total", OF_REPLICA, "model", "kind"), "{{model}} {{kind}}"),),
                    "By what became of the sequences' KV.",
                    width=12,
                ),
            ),
        ),
        Row(
            "Batches",
            (
                Panel(
                    "Requests in the engines",
                    "short",
                    (Query(total("quire_engine_requests", OF_REPLICA, "state"), "{{state}}"),),
                    stacked=True,
                ),
                Panel(
                    "Tokens drawn in a step",
                    "short",
                    (
                        Query(
                            rate("quire_engine_output_tokens_total", OF_REPLICA, "model", "replica")
                            + " / "
                            + rate("quire_engine_steps_total", OF_REPLICA, "model", "replica"),
                            "{{model}} {{replica}}",
                        ),
                    ),
                    "The mean batch of decodes.",
                ),
                Panel(
                    "Tokens drawn",
                    "cps",
                    (
                        Query(
                            rate("quire_engine_output_tokens_total", OF_REPLICA, "model", "replica"),
                            "{{model}} {{replica}}",
                        ),
                    ),
                ),
                Panel(
                    "Prompt tokens computed",
                    "cps",
                    (
                        Query(
                            rate("quire_prefix_cache_queried_tokens_total", OF_REPLICA, "model", "replica")
                            + " - "
                            + rate("quire_prefix_cache_hit_tokens_total", OF_REPLICA, "model", "replica"),
                            "{{model}} {{replica}}",
                        ),
                    ),
                    "Those of new requests that no prefix cache had.",
                    width=12,
                ),
                Panel(
                    "Steps",
                    "ops",
                    (Query(rate("quire_engine_steps_total", OF_REPLICA, "model", "replica"), "{{model}} {{replica}}"),),
                    width=12,
                ),
            ),
        ),
        Row(
            "Time of a step",
            (
                Panel(
                    "Mean step by phase",
                    "s",
                    (
                        Query(
                            rate("quire_engine_step_seconds_total", OF_REPLICA, "phase")
                            + f" / scalar({rate('quire_engine_steps_total', OF_REPLICA)})",
                            "{{phase}}",
                        ),
                    ),
                    "Choosing the batch, waiting for the device, taking its tokens over.",
                    stacked=True,
                    width=12,
                ),
                Panel(
                    "Share of time in steps",
                    "percentunit",
                    (
                        Query(
                            rate("quire_engine_step_seconds_total", OF_REPLICA, "model", "replica"),
                            "{{model}} {{replica}}",
                        ),
                    ),
                    "An engine at 100 % is never without a step.",
                    width=12,
                ),
            ),
        ),
    ),
)
