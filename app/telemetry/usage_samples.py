"""Samples of the usage ledger: that it works, not what was used, as tenants are too many for labels."""

from __future__ import annotations

from app.telemetry import metrics
from app.telemetry.samples import MetricSample, sample
from app.usage.writer import UsageStats


def usage_samples(stats: UsageStats) -> list[MetricSample]:
    """What one ingress's ledger has done and failed to do."""
    errors = stats.errors.items()
    return [
        sample(metrics.USAGE_RECORDS, stats.written),
        sample(metrics.USAGE_DROPPED, stats.dropped),
        *(sample(metrics.USAGE_ERRORS, count, operation) for operation, count in errors),
    ]
