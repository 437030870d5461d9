"""A generation's entry in the usage ledger: begun when it is sound, ended with its HTTP request."""

from __future__ import annotations

from app.ingress.generation import Generation
from app.telemetry.ingress_metrics import RequestRecord
from app.usage import UsageLedger


def keep_usage(ledger: UsageLedger, generation: Generation, record: RequestRecord) -> None:
    """Have the ledger keep what a generation uses, for its tenant; after its `terms` are set, before `deltas`."""
    model, tenant = generation.model, generation.terms.tenant
    request_id = generation.requests[0].request_id
    kept = ledger.begin(request_id, tenant, model.parent or model.id, model.adapter, generation.usage)

    def end(record: RequestRecord) -> None:
        ledger.end(kept, int(record.code), ",".join(sorted(record.finish_reasons)))

    record.when_ended(end)
