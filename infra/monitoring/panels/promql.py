"""The queries that panels share, and the variables that they are asked for."""

from __future__ import annotations

from infra.monitoring.panels.model import Query, Variable

MODEL = Variable("model", "Model", "label_values(quire_replicas, model)")
CLASS = Variable("class", "Class", 'label_values(quire_admission_queued_requests{model=~"$model"}, class)')
REPLICA = Variable("replica", "Replica", 'label_values(quire_engine_steps_total{model=~"$model"}, replica)')
# Buckets of the histograms, as their label `le` has them.
FIRST_TOKEN_TARGET = Variable(
    "ttft", "First token within, s", values=("0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0"), chosen="1.0"
)
TOKEN_TARGET = Variable(
    "tpot", "A token within, s", values=("0.02", "0.03", "0.05", "0.075", "0.1", "0.15", "0.25"), chosen="0.1"
)

# Label matchers, as the reader chose.
# What is counted by request has a model's adapters as models of their own, `base:adapter`: they belong to its base.
OF_MODEL = 'model=~"$model(:.+)?"'
OF_CLASS = 'model=~"$model(:.+)?", class=~"$class"'
OF_REPLICA = 'model=~"$model", replica=~"$replica"'


def rate(name: str, selector: str, *by: str) -> str:
    """Increase a second of a counter, summed over processes."""
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouping} (rate({name}{{{selector}}}[$__rate_interval]))"


def total(name: str, selector: str, *by: str) -> str:
    """A gauge summed over processes."""
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouping} ({name}{{{selector}}})"


def quantiles(name: str) -> tuple[Query, ...]:
    """Percentiles of a histogram by model and class."""
    summed = rate(f"{name}_bucket", OF_CLASS, "model", "class", "le")
    return tuple(
        Query(f"histogram_quantile({share}, {summed})", f"{{{{model}}}} {{{{class}}}} {called}")
        for share, called in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    )


SLOTS = "quire_kv_cache_slots"
# Slots that a request can have at once.
FREE = ', kind=~"cached|empty"'
